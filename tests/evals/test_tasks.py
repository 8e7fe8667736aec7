"""Rows of any dataset become questions, and questions become prompts."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from job.chat.conversation import Message
from job.data.examples import Example
from job.errors import UsageError
from job.evals.questions import Question
from job.evals.tasks import (
    Task,
    doc_to_text,
    load_task,
    question_messages,
    question_prompts,
)
from job.model.language_model import LanguageModel
from job.runtime import logs
from job.spec.schema import MultipleChoiceEval

Row = dict[str, Any]
COLUMNS = ["opa", "opb", "opc", "opd"]
ROW: Row = {"question": "Which one?", "opa": "Red", "opb": "Green", "opc": "Blue", "opd": "12"}


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    logs.configure(stream=stream)
    yield stream
    structlog.reset_defaults()


def load(folder: Path, rows: list[Row], **entry: Any) -> Task:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields: Row = {"options": COLUMNS, "answer": "cop", **entry}
    return load_task(MultipleChoiceEval(name="first", dataset=str(path), **fields))


def ids(task: Task) -> list[str]:
    return [question.id for question in task.questions]


def test_a_row_becomes_a_question(tmp_path: Path) -> None:
    task = load(tmp_path, [ROW | {"cop": 1, "id": "q-7"}], id="id", answer_is="index")
    expected = Question("q-7", "Which one?", ("Red", "Green", "Blue", "12"), "B")
    assert (task.questions, task.revision) == ([expected], None)
    assert task.questions[0].letters == "ABCD"


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        (0, "A"),
        *(("A", "A"), ("d", "D"), (" b ", "B")),
        *(("0", "A"), ("4", "D"), (4, "D")),
        *(("Green", "B"), (" Blue ", "C"), ("12", "D")),
    ],
)
def test_the_right_option_is_an_index_letter_number_or_text(
    given: object, gold: str, tmp_path: Path
) -> None:
    assert load(tmp_path, [ROW | {"cop": given}]).questions[0].gold == gold


@pytest.mark.parametrize(
    "given", [-1, 5, "5", "-1", "E", "", "Grey", "green", True, None, ["A"], 1.5, "AB"]
)
def test_a_row_without_a_right_option_is_dropped(
    given: object, tmp_path: Path, log: io.StringIO
) -> None:
    rows = [ROW | {"cop": given}, ROW | {"cop": 0}]
    assert ids(load(tmp_path, rows)) == ["1"]
    line = json.loads(log.getvalue())
    assert (line["rows"], line["reasons"]) == (2, {"no right option in 'cop'": 1})


def test_a_text_of_two_options_is_no_right_option(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no right option in 'cop'"):
        load(tmp_path, [ROW | {"opb": "Red", "cop": "Red"}])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": ""}, "empty question"),
        ({"question": None}, "null in 'question'"),
        ({"opb": "  "}, "empty option"),
        ({"opb": None}, "null in 'opb'"),
        ({"opb": ["x"]}, "not text in 'opb'"),
        ({"cop": None}, "no right option in 'cop'"),
        ({"key": None}, "null in 'key'"),
    ],
)
def test_an_unusable_row_is_dropped_and_counted(
    change: Row, reason: str, tmp_path: Path, log: io.StringIO
) -> None:
    row = ROW | {"cop": 0}
    task = load(tmp_path, [row | {"key": "a"}, row | {"key": "b"} | change], id="key")
    assert ids(task) == ["a"]
    assert json.loads(log.getvalue())["reasons"] == {reason: 1}


def test_options_may_be_one_column_with_a_list(tmp_path: Path) -> None:
    rows = [
        {"question": "Q", "choices": ["x", " y ", 3], "cop": "y"},
        {"question": "Q", "choices": ["x"], "cop": 0},
        {"question": "Q", "choices": "x, y, z", "cop": 0},
        {"question": "Q", "choices": ["x"] * 27, "cop": 0},
        {"question": "Q", "choices": ["x", "", "z"], "cop": 0},
        {"question": "Q", "cop": 0},
    ]
    task = load(tmp_path, rows, options="choices")
    assert [(q.options, q.gold) for q in task.questions] == [(("x", "y", "3"), "B")]


def test_the_limit_takes_the_first_usable_questions(tmp_path: Path) -> None:
    rows = [ROW | {"cop": -1 if n in (0, 2) else 0} for n in range(9)]
    assert ids(load(tmp_path, rows, limit=3)) == ["1", "3", "4"]
    assert ids(load(tmp_path, rows, limit=7)) == ["1", "3", "4", "5", "6", "7", "8"]
    assert ids(load(tmp_path, rows)) == ["1", "3", "4", "5", "6", "7", "8"]


def test_with_answer_is_rows_after_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(ROW | {"cop": 0}) + "\n" + json.dumps(ROW | {"cop": 1}) + "\n{")
    entry = MultipleChoiceEval(
        name="a", dataset=str(path), options=COLUMNS, answer="cop", answer_is="index", limit=1
    )
    assert ids(load_task(entry)) == ["0"]


def test_fewer_questions_than_the_limit_give_a_warning(tmp_path: Path, log: io.StringIO) -> None:
    assert len(load(tmp_path, [ROW | {"cop": 0}], limit=5).questions) == 1
    line = json.loads(log.getvalue())
    assert (line["severity"], line["questions"], line["limit"]) == ("WARNING", 1, 5)


def test_a_repeated_id_is_dropped(tmp_path: Path, log: io.StringIO) -> None:
    rows = [ROW | {"cop": n, "id": identity} for n, identity in enumerate(["a", "b", "a"])]
    task = load(tmp_path, rows, id="id")
    assert [(question.id, question.gold) for question in task.questions] == [
        ("a", "A"),
        ("b", "B"),
    ]
    assert json.loads(log.getvalue())["reasons"] == {"repeated id": 1}


def test_an_error_without_questions_names_reasons_and_columns(
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError) as refused:
        load(tmp_path, [ROW | {"cop": 9}, {"question": "Q"}])
    message = str(refused.value)
    assert message.startswith("evals.multiple_choice 'first': no usable question in ")
    assert "no right option in 'cop' (1), no column 'opa' (1)" in message
    assert "the columns are cop, opa, opb, opc, opd, question" in message
    with pytest.raises(UsageError, match="no rows"):
        load(tmp_path, [])


def test_the_user_message_lists_the_options_by_letter(tmp_path: Path) -> None:
    row = ROW | {"question": "A {b} or {0}?", "opa": "{question}", "cop": 0}
    task = load(tmp_path, [row], prompt="{options}\n--\n{question}")
    assert doc_to_text(task.entry, task.questions[0]) == (
        "A. {question}\nB. Green\nC. Blue\nD. 12\n--\nA {b} or {0}?"
    )


def test_the_samples_are_usable_questions() -> None:
    entry = MultipleChoiceEval(name="a", dataset="samples", options=COLUMNS, answer="cop", id="id")
    questions = load_task(entry).questions
    assert len(questions) >= 20
    assert {question.gold for question in questions} == set("ABCD")


GROUPED_ROWS = [
    {"question": f"Which {n}?", "a": "red ", "b": f"blue {n}", "cop": n % 2, "about": subject}
    for n, subject in enumerate(["Eyes", "Eyes", None, "Skin", "Skin", "Skin"])
]


def load_grouped(folder: Path, **entry: Any) -> Task:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GROUPED_ROWS), encoding="utf-8")
    fields: dict[str, Any] = {"options": ["a", "b"], "answer": "cop", **entry}
    return load_task(MultipleChoiceEval(name="first", dataset=str(path), **fields))


def test_few_shot_examples_are_earlier_turns_and_not_scored(tmp_path: Path) -> None:
    task = load_grouped(tmp_path, limit=2, few_shot={"examples": 2})
    assert [example.text for example in task.few_shot] == ["Which 2?", "Which 3?"]
    first = question_messages(task)[0]
    assert question_prompts(task)[0] == first
    assert [m.content for m in first if m.role == "assistant"] == ["A", "B"]
    assert [m.role for m in first] == ["user", "assistant", "user", "assistant", "user"]
    assert first[0].content.startswith("Which 2?")
    assert first[-1].content.startswith("Which 0?")


def test_too_few_few_shot_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="split 'train' has only 1 usable questions that are not"):
        load_grouped(tmp_path, limit=5, few_shot={"examples": 2})


def test_the_lm_eval_prompt_is_plain_text(tmp_path: Path) -> None:
    task = load_grouped(tmp_path, limit=1, prompt="lm-eval", few_shot={"examples": 1})
    assert question_prompts(task) == [
        "Question: Which 1?\nChoices:\nA. red \nB. blue 1\nAnswer: B\n\n"
        "Question: Which 0?\nChoices:\nA. red \nB. blue 0\nAnswer:"
    ]


def test_the_lm_eval_prompt_is_for_letters_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`prompt: lm-eval` needs `scoring: letters`"):
        load_grouped(tmp_path, prompt="lm-eval", scoring="generate")


def test_questions_have_their_group(tmp_path: Path) -> None:
    assert [q.group for q in load_grouped(tmp_path, group="about").questions] == [
        "Eyes", "Eyes", "none", "Skin", "Skin", "Skin",
    ]  # fmt: skip


def test_letters_after_a_space_differ_in_their_last_token(tiny: LanguageModel) -> None:
    options = tiny.tokenizer.letter_tokens("ABCD", "Answer:", " ")
    context = tiny.tokenizer.encode(["Answer:"])[0]
    for letter, last in zip("ABCD", options.ids, strict=True):
        assert tiny.tokenizer.encode([f"Answer: {letter}"])[0] == [*context, *options.prefix, last]


def test_a_prompt_is_shown_by_the_last_words_of_the_user() -> None:
    messages = (Message("user", "look"), Message("assistant", "wait"), Message("tool", "rain"))
    assert Example("p", (*messages, Message("assistant", ""))).prompt == "look"
