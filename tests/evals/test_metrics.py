"""Accuracy by task and group, paired comparisons and style traits.

Missing answers are not counted, unparsed ones are wrong, and comparisons are paired.
"""

import json
from importlib import resources
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF

from job.evals.metrics import (
    ROUGE_METRICS,
    group_scores,
    overlap_scores,
    phrase_pattern,
    score_choices,
    summarize_choices,
    summarize_style,
)
from job.evals.paired import compare_proportions, decide_findings
from job.evals.predictions import ChoiceLine, DialogueLine, choice_line, scores_by_id
from job.evals.questions import Question
from job.evals.statistics import mcnemar, wilson
from job.scores import Comparison
from job.spec.schema import MultipleChoiceEval

MISSING = "!"
"""Choice of a question without an answer; "-" is an answer that names no letter."""


def lines(choices: str, golds: str | None = None, start: int = 0) -> list[ChoiceLine]:
    """Return one line per choice; the right letter is A unless `golds` differs."""
    made = []
    for number, choice in enumerate(choices):
        gold = golds[number] if golds else "A"
        question = Question(f"q{start + number}", "Which?", ("w", "x", "y", "z"), gold)
        if choice == MISSING:
            made.append(choice_line(question, None, error="HTTP 502 (tried 5 times)"))
        else:
            made.append(choice_line(question, None if choice == "-" else choice, answer=choice))
    return made


def compare_choices(
    models: tuple[str, str], before: list[ChoiceLine], after: list[ChoiceLine]
) -> Comparison | None:
    """Compare two models on the questions both answered."""
    return compare_proportions(models, scores_by_id(before), scores_by_id(after), "primary")


@pytest.mark.parametrize(
    ("expected", "close", "other"),
    [
        ("我得了糖尿病，应该怎么办？", "我得了高血压，应该怎么办？", "再见"),
        ("熱があります。", "熱がありません。", "さようなら"),
        ("コーヒーを飲む", "コーヒーを買う", "犬"),
        ("ฉันปวดหัวมาก", "ฉันปวดท้องมาก", "ฟซศ"),
        ("Привет, как дела сегодня?", "Как дела сегодня", "Спасибо"),
        ("어떻게 지내세요", "잘 지내세요", "안녕"),
        ("मुझे बुखार है", "मुझे खांसी है", "धन्यवाद"),
        ("كيف حالك اليوم", "كيف حالك", "شكرا"),
        ("Τι κάνεις σήμερα;", "τι κάνεις", "ευχαριστώ"),
    ],
)
def test_answers_in_any_script_are_told_from_each_other(
    expected: str, close: str, other: str
) -> None:
    same, near, far = (overlap_scores(expected, text) for text in (expected, close, other))
    for name in ("rouge1", "rougeL", "chrf"):
        assert same[name] == 1
        assert 0.2 < near[name] < 1
        assert far[name] < 0.1


ENGLISH = st.lists(st.sampled_from([*"abyzAZ09 ing.,'_-’“”—…°²½µ•\n", "❤️", "1️⃣"])).map("".join)


@given(ENGLISH, ENGLISH)
def test_rouge_of_english_is_that_of_rouge_score(expected: str, answer: str) -> None:
    theirs = RougeScorer(ROUGE_METRICS, use_stemmer=True).score(expected, answer)
    ours = overlap_scores(expected, answer)
    assert [ours[name] for name in ROUGE_METRICS] == [
        round(theirs[name].fmeasure, 6) for name in ROUGE_METRICS
    ]


def test_rouge_of_the_samples_is_that_of_rouge_score() -> None:
    text = (resources.files("job") / "samples" / "dialogues.jsonl").read_text("utf-8")
    answers = [str(list(json.loads(line).values())[-1]) for line in text.splitlines()[:100]]
    scorer = RougeScorer(ROUGE_METRICS, use_stemmer=True)
    for expected, answer in pairwise(answers):
        theirs = scorer.score(expected, answer)
        ours = overlap_scores(expected, answer)
        assert all(ours[n] == round(theirs[n].fmeasure, 6) for n in ROUGE_METRICS)
    assert len(answers) > 50


def test_chrf_is_that_of_sacrebleu() -> None:
    theirs = CHRF().sentence_score("It may pass by itself.", ["It will pass soon."]).score
    assert overlap_scores("It will pass soon.", "It may pass by itself.")["chrf"] == pytest.approx(
        theirs / 100, abs=1e-6
    )


def test_a_missing_answer_is_counted_apart() -> None:
    score = score_choices(lines("AAB!!"))
    assert (score.correct, score.missing, score.unparsed) == (2, 2, 0)
    assert score.accuracy == pytest.approx(2 / 3)
    assert score.ci95 == wilson(2, 3)


def test_an_unparsed_answer_is_wrong() -> None:
    score = score_choices(lines("AAB--"))
    assert (score.correct, score.missing, score.unparsed) == (2, 0, 2)
    assert score.accuracy == pytest.approx(2 / 5)
    assert score.ci95 == wilson(2, 5)


def test_chosen_letters_are_counted() -> None:
    assert score_choices(lines("CAB-A!", "AAAAAA")).letters == {"A": 2, "B": 1, "C": 1}


@pytest.mark.parametrize("choices", ["", "!!!"])
def test_without_an_answer_the_interval_is_0_to_1(choices: str) -> None:
    score = score_choices(lines(choices))
    assert (score.correct, score.accuracy, score.ci95) == (0, 0.0, (0.0, 1.0))
    assert score.missing == len(choices)


def test_models_are_compared_on_questions_both_answered() -> None:
    before = lines("BBBAA!!")
    after = lines("AA-BA!A")
    comparison = compare_choices(("baseline", "finetuned"), before, after)
    assert comparison is not None
    assert (comparison.a, comparison.b, comparison.questions) == ("baseline", "finetuned", 5)
    assert (comparison.gained, comparison.lost) == (2, 1)
    assert comparison.p_value == mcnemar(2, 1)
    assert comparison.difference == pytest.approx(1 / 5)
    assert comparison.finding == "no measurable change"


def test_questions_are_matched_by_id() -> None:
    before = lines("AB")
    after = [*lines("B", start=1), *lines("A")]
    comparison = compare_choices(("a", "b"), before, after)
    assert comparison is not None
    assert (comparison.questions, comparison.gained, comparison.lost) == (2, 0, 0)
    assert (comparison.difference, comparison.p_value) == (0.0, 1.0)


@pytest.mark.parametrize(("before", "after"), [("AB", ""), ("", "AB"), ("!!", "AB"), ("A!", "!A")])
def test_without_shared_questions_there_is_no_comparison(before: str, after: str) -> None:
    assert compare_choices(("a", "b"), lines(before), lines(after)) is None


def test_a_clear_change_shows_in_both_directions() -> None:
    poor, good = lines("B" * 40), lines("A" * 30 + "B" * 10)
    better = compare_choices(("a", "b"), poor, good)
    worse = compare_choices(("b", "a"), good, poor)
    assert better is not None
    assert worse is not None
    findings = [decide_findings(test).finding for test in (better, worse)]
    assert findings == ["improved", "worse"]
    assert better.ci95 == pytest.approx((-worse.ci95[1], -worse.ci95[0]))
    assert better.ci95[0] > 0


ENTRY = MultipleChoiceEval(name="first", dataset="samples", options=list("wxyz"), answer="cop")


def test_a_task_has_chance_and_majority_baselines() -> None:
    golds = "AABBBBCD"
    models = {
        "baseline": lines("AAAAAAAA", golds),
        "finetuned": lines("AABBBBAA", golds),
        "reference": lines("AABBBBC!", golds),
    }
    result = summarize_choices(ENTRY, models, revision="abc")
    assert (result.name, result.revision, result.questions, result.chance) == (
        "first",
        "abc",
        8,
        0.25,
    )
    assert (result.majority_letter, result.majority_accuracy) == ("B", 0.5)
    assert {name: one.correct for name, one in result.models.items()} == {
        "baseline": 2,
        "finetuned": 6,
        "reference": 7,
    }
    assert [(c.a, c.b, c.questions, c.gained, c.lost) for c in result.comparisons] == [
        ("baseline", "finetuned", 8, 4, 0),
        ("finetuned", "reference", 7, 1, 0),
    ]


def test_without_a_reference_there_is_one_comparison() -> None:
    models = {"baseline": lines("AB"), "finetuned": lines("AA")}
    result = summarize_choices(ENTRY, models)
    assert [(c.a, c.b) for c in result.comparisons] == [("baseline", "finetuned")]
    silent = summarize_choices(ENTRY, models | {"reference": lines("!!")})
    assert [(c.a, c.b) for c in silent.comparisons] == [("baseline", "finetuned")]
    assert silent.models["reference"].missing == 2


def grouped_lines(choices: str, subjects: list[str | None]) -> list[ChoiceLine]:
    made = []
    for number, (choice, subject) in enumerate(zip(choices, subjects, strict=True)):
        question = Question(f"q{number}", "Which?", ("w", "x"), "A", subject)
        error = "HTTP 502" if choice == "!" else None
        made.append(choice_line(question, None if choice in "-!" else choice, error=error))
    return made


def test_groups_are_sorted_by_size_without_missing_answers() -> None:
    subjects: list[str | None] = ["Eyes", "Skin", "Skin", "Skin"]
    groups = group_scores(
        {"baseline": grouped_lines("ABA-", subjects), "reference": grouped_lines("!AA!", subjects)}
    )
    assert [(g.name, g.questions) for g in groups] == [("Skin", 3), ("Eyes", 1)]
    skin, eyes = groups
    assert (skin.models["baseline"].count, skin.models["baseline"].of) == (1, 3)
    assert (skin.models["reference"].count, skin.models["reference"].of) == (2, 2)
    assert (eyes.models["reference"].of, eyes.models["reference"].ci95) == (0, (0.0, 1.0))


def test_questions_without_a_group_are_not_grouped() -> None:
    assert group_scores({"baseline": grouped_lines("AB", [None, None])}) == []


@pytest.mark.parametrize(
    ("phrases", "text", "shows"),
    [
        (["see a doctor"], "Please See  a\nDoctor today", True),
        (["may"], "Maybe in May-be", True),
        (["may"], "maybe dismay", False),
        (["?"], "Does it hurt?", True),
        (["?"], "It hurts.", False),
        (["#"], "take it twice", False),
        (["#"], "take 1,000 mg", True),
        (["# mg"], "take 2.5 mg", True),
        (["# mg"], "take some mg", False),
        (["don't"], "Don’t worry", True),
        (["(sic)"], "this (sic) is", True),
    ],
)
def test_phrases_match_complete_words(phrases: list[str], text: str, shows: bool) -> None:
    assert (phrase_pattern(phrases).search(text.replace("’", "'")) is not None) is shows


def dialogue_line(number: int, answer: str, expected: str) -> DialogueLine:
    return DialogueLine(
        id=str(number), prompt="p", expected=expected, answer=answer, tokens=1, finish="stop",
        rouge1=0, rouge2=0, rougeL=0,
    )  # fmt: skip


MARKERS = {
    "urges urgent care": ["emergency"],
    "refers to a professional": ["a doctor"],
    "hedges": ["may"],
    "asks back": ["?"],
}


def test_each_trait_is_a_share_of_each_model_and_the_expected() -> None:
    before = [dialogue_line(n, "It may pass.", "Consult a doctor.") for n in range(20)]
    after = [
        dialogue_line(n, "Go to the emergency room now.", "Consult a doctor.") for n in range(20)
    ]
    models = {"baseline": before, "finetuned": after}
    traits = {trait.name: trait for trait in summarize_style(MARKERS, models)}
    urgent = traits["urges urgent care"]
    assert (urgent.models["baseline"].share, urgent.models["finetuned"].share) == (0.0, 1.0)
    assert urgent.expected.share == 0.0
    assert urgent.comparison is not None
    assert (urgent.comparison.gained, urgent.comparison.lost) == (20, 0)
    assert traits["hedges"].models["baseline"].count == 20
    assert traits["refers to a professional"].expected.share == 1.0
    assert traits["asks back"].comparison is not None
    assert traits["asks back"].comparison.finding == "no measurable change"
