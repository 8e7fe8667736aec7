"""The right option is read as the complete column shows, or refused; options come in many forms."""

import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import UsageError
from job.evals.engine import Engine
from job.evals.local_model import LocalModel
from job.evals.metrics import summarize_choices
from job.evals.tasks import Task, load_task
from job.model.language_model import LanguageModel
from job.spec.schema import MultipleChoiceEval
from tests.conversations import conversation
from tests.evals.test_prediction_cache import cache_in

COLUMNS = ["opa", "opb", "opc", "opd"]
TEXTS = ("Red", "Green", "Blue", "Gray")


def load(folder: Path, rows: list[dict[str, Any]], **entry: Any) -> Task:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = {"options": COLUMNS, "answer": "cop", **entry}
    return load_task(MultipleChoiceEval(name="first", dataset=str(path), **fields))


def keyed(answers: list[Any], texts: tuple[str, ...] = TEXTS) -> list[dict[str, Any]]:
    """Return one row per answer, all with the same options."""
    options = dict(zip(COLUMNS, texts, strict=True))
    return [{"question": f"Which {n}?", **options, "cop": cop} for n, cop in enumerate(answers)]


def golds(task: Task) -> str:
    return "".join(question.gold for question in task.questions)


@pytest.mark.parametrize(
    ("answers", "letters"),
    [
        ([1, 2, 3, 4], "ABCD"),
        (["1", " 4 ", "2"], "ADB"),
        ([1.0, 4.0, 2.0], "ADB"),
        ([4, "A", "b", 1], "DABA"),
        (["D", 0, 3, "a"], "DADA"),
        ([2, 1, 0], "CBA"),
        (["１", "４"], "AD"),
        (["Ｂ", "C"], "BC"),
        (["Green", "Blue"], "BC"),
    ],
)
def test_the_complete_column_decides_how_answers_are_read(
    answers: list[Any], letters: str, tmp_path: Path
) -> None:
    assert golds(load(tmp_path, keyed(answers))) == letters


@pytest.mark.parametrize(
    ("answers", "texts", "letters"),
    [
        ([1, 2, 3, 4], ("1", "2", "3", "4"), "ABCD"),
        ([0, 1, 3], ("3", "2", "1", "0"), None),
        ([0, 3, 1], ("5", "3", "7", "9"), "ADB"),
        ([5, 3], ("5", "3", "7", "9"), "AB"),
        (["C", "H"], ("H", "C", "N", "O"), "BA"),
        (["C", "A"], ("C", "A", "B", "D"), None),
    ],
)
def test_answers_that_may_be_texts_are_read_as_what_fits_all(
    answers: list[Any], texts: tuple[str, ...], letters: str | None, tmp_path: Path
) -> None:
    if letters is not None:
        assert golds(load(tmp_path, keyed(answers, texts))) == letters
        return
    with pytest.raises(UsageError, match="can be read in two ways"):
        load(tmp_path, keyed(answers, texts))


@pytest.mark.parametrize(
    ("answers", "meanings"),
    [
        ([1, 2, 3], "as index, '1' means B ('Green') for 'Which 0?', but as number, '1' means A"),
        (["2", "3"], "as index, '2' means C ('Blue') for 'Which 0?', but as number, '2' means B"),
        ([0, 1, 4], "as index, '1' means B ('Green') for 'Which 1?', but as number, '1' means A"),
        ([0, 4], "as index, '0' means A ('Red') for 'Which 0?', but as number, '4' means D"),
        (["A", "Blue"], "as letter, 'A' means A ('Red') for 'Which 0?', but as text, 'Blue'"),
    ],
)
def test_answers_with_two_readings_are_refused(
    answers: list[Any], meanings: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        load(tmp_path, keyed(answers), limit=1)
    assert str(refused.value).startswith("evals.multiple_choice 'first': the answers in 'cop' can")
    assert meanings in str(refused.value)
    assert str(refused.value).endswith("; set answer_is to the right one")
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(("form", "letters"), [("index", "BCD"), ("number", "ABC")])
def test_answer_is_decides_between_readings(form: str, letters: str, tmp_path: Path) -> None:
    assert golds(load(tmp_path, keyed([1, 2, 3]), answer_is=form)) == letters


def test_few_shot_answers_are_read_like_the_questions(tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_text(
        "".join(json.dumps(row | {"question": "Dev?"}) + "\n" for row in keyed([2])),
        encoding="utf-8",
    )
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in keyed([4, 1])), encoding="utf-8"
    )
    entry = MultipleChoiceEval(
        name="first", dataset=str(tmp_path), data_files=["test.jsonl"], options=COLUMNS,
        answer="cop", few_shot={"examples": 1, "data_files": ["dev.jsonl"]},
    )  # fmt: skip
    task = load_task(entry)
    assert (golds(task), task.few_shot[0].gold) == ("DA", "B")


FOUR = list(TEXTS)
OPTION_FORMS: list[tuple[Any, Any, tuple[str, ...], str]] = [
    (FOUR, 0, TEXTS, "A"),
    ({"text": FOUR, "label": list("ABCD")}, "C", TEXTS, "C"),
    ({"text": FOUR, "label": list("1234")}, "3", TEXTS, "C"),
    ({"label": list("1234"), "text": FOUR}, 3, TEXTS, "C"),
    ({"text": FOUR}, "Green", TEXTS, "B"),
    ({"text": ["Green", "Red"], "label": ["B", "A"]}, "B", ("Red", "Green"), "B"),
    ({"A": "Red", "B": "Green", "C": "Blue"}, "B", TEXTS[:3], "B"),
    ({"B": "Green", "A": "Red", "C": None}, "A", TEXTS[:2], "A"),
    ({"1": "Red", "2": "Green"}, 2, TEXTS[:2], "B"),
    ({"a": "Red", "b": "Green"}, "B", TEXTS[:2], "B"),
    ([{"key": "A", "value": "Red"}, {"key": "B", "value": "Green"}], "B", TEXTS[:2], "B"),
    ([{"label": "i", "text": "Red"}, {"label": "ii", "text": "Green"}], "ii", TEXTS[:2], "B"),
    ([{"text": "Red"}, {"text": "Green"}], "Red", TEXTS[:2], "A"),
]


@pytest.mark.parametrize(("options", "answer", "texts", "gold"), OPTION_FORMS)
def test_options_are_read_in_the_forms_of_datasets(
    options: Any, answer: Any, texts: tuple[str, ...], gold: str, tmp_path: Path
) -> None:
    task = load(tmp_path, [{"question": "Q", "o": options, "cop": answer}], options="o")
    assert [(q.options, q.gold) for q in task.questions] == [(texts, gold)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("['Red', 'Green']", "no list of options in 'o'"),
        ({"first": "Red", "second": "Green"}, "no list of options in 'o'"),
        ({"text": ["Red", "Green"], "label": ["A"]}, "no list of options in 'o'"),
        ({"text": "Red", "label": "A"}, "no list of options in 'o'"),
        ([{"a": "Red"}, {"b": "Green"}], "null in 'o'"),
        ([{"key": "A", "value": ["Red"]}, {"key": "B", "value": "x"}], "not text in 'o'"),
        ([["Red"], ["Green"]], "not text in 'o'"),
        ([True, False], "not text in 'o'"),
        (["Red", {"text": "Green"}], "null in 'o'"),
        ([{"key": "A", "value": "Red"}, {"key": "A", "value": "x"}], "repeated label in 'o'"),
    ],
)
def test_options_in_another_form_are_dropped_with_a_reason(
    options: Any, reason: str, tmp_path: Path
) -> None:
    rows = [{"question": "Q", "o": each, "cop": "Green"} for each in (options, FOUR)]
    task = load(tmp_path, rows, options="o")
    assert [question.options for question in task.questions] == [TEXTS]
    assert (task.rows.raw, task.rows.valid, task.rows.dropped) == (2, 1, {reason: 1})


def test_each_question_is_scored_among_its_own_options(tmp_path: Path, tiny: LanguageModel) -> None:
    rows = [{"question": f"Q{n}", "o": FOUR[:n], "cop": "Red"} for n in (2, 4, 2, 3)]
    task = load(tmp_path, rows, options="o")
    engine = Engine(tiny, 2, 512)
    local = LocalModel(engine, tiny.weights, cache_in(tmp_path))
    lines, _ = local.answer_questions(task)
    scores = [line.log_probabilities or {} for line in lines]
    assert ["".join(each) for each in scores] == ["AB", "ABCD", "AB", "ABC"]
    assert [line.choice for line in lines] == [max(each, key=each.__getitem__) for each in scores]
    models = {"baseline": lines, "finetuned": lines}
    result = summarize_choices(task.entry, models)
    assert result.chance == pytest.approx((1 / 2 + 1 / 4 + 1 / 2 + 1 / 3) / 4)


def test_too_many_truncated_prompts_are_refused(tmp_path: Path, tiny: LanguageModel) -> None:
    rows = [*keyed([0] * 3), keyed([0])[0] | {"question": "word " * 90}]
    task, long = load(tmp_path, rows), conversation("1", "word " * 90, "Rest.")
    engine = Engine(tiny, 2, 80)

    def local(share: float) -> LocalModel:
        return LocalModel(engine, tiny.weights, cache_in(tmp_path), share)

    assert local(0.25).answer_questions(task)[1] == 1
    prompts = [long.prompt_messages]
    assert local(1).generate("dialogue", prompts, 1)[1] == 1
    assert local(0).generate("side_by_side", prompts, 1)[1] == 1
    with pytest.raises(UsageError) as refused:
        local(0.2).answer_questions(task)
    assert str(refused.value).startswith(
        "evals: 1 of 4 prompts of 'first' are longer than evals.max_prompt_tokens (80) and would "
        "lose their beginning, more than evals.max_truncated_share (0.2)"
    )
    with pytest.raises(UsageError, match="1 of 1 prompts of 'dialogue'"):
        local(0.5).generate("dialogue", prompts, 1)


def test_shuffled_options_depend_on_the_question_only(tmp_path: Path) -> None:
    rows = keyed([0] * 40)
    plain, task = load(tmp_path, rows), load(tmp_path, rows, shuffle_options=True)
    assert set(golds(plain)) == {"A"}
    assert set(golds(task)) == set("ABCD")
    assert all(q.options["ABCD".index(q.gold)] == "Red" for q in task.questions)
    backward = load(tmp_path, rows[::-1], shuffle_options=True)
    by_text = {q.text: q.options for q in backward.questions}
    assert all(by_text[q.text] == q.options for q in task.questions)
