"""A missing answer is not wrong, an unreadable one is, and only shared answers are compared."""

import pytest

from job.evals.metrics import compare_choices, score_choices, summarize_choices
from job.evals.predictions import ChoiceLine, choice_line
from job.evals.statistics import mcnemar, wilson
from job.evals.tasks import Question
from job.spec.schema import MultipleChoiceEval

MISSING = "!"
"""Stands for a question that got no answer; "-" for an answer that named no letter."""


def lines(choices: str, golds: str | None = None, start: int = 0) -> list[ChoiceLine]:
    """One line a choice; the right letter is A unless `golds` says otherwise."""
    found = []
    for number, choice in enumerate(choices):
        gold = golds[number] if golds else "A"
        question = Question(f"q{start + number}", "Which?", ("w", "x", "y", "z"), gold)
        if choice == MISSING:
            found.append(choice_line(question, None, error="HTTP 502 (tried 5 times)"))
        else:
            found.append(choice_line(question, None if choice == "-" else choice, answer=choice))
    return found


def test_a_missing_answer_is_counted_and_not_taken_for_wrong() -> None:
    found = score_choices(lines("AAB!!"))
    assert (found.correct, found.missing, found.unparsed) == (2, 2, 0)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.ci95 == wilson(2, 3)


def test_an_answer_that_names_no_letter_is_counted_and_wrong() -> None:
    found = score_choices(lines("AAB--"))
    assert (found.correct, found.missing, found.unparsed) == (2, 0, 2)
    assert found.accuracy == pytest.approx(2 / 5)
    assert found.ci95 == wilson(2, 5)


def test_the_letters_chosen_are_counted() -> None:
    assert score_choices(lines("CAB-A!", "AAAAAA")).letters == {"A": 2, "B": 1, "C": 1}


@pytest.mark.parametrize("choices", ["", "!!!"])
def test_without_an_answer_nothing_is_known(choices: str) -> None:
    found = score_choices(lines(choices))
    assert (found.correct, found.accuracy, found.ci95) == (0, 0.0, (0.0, 1.0))
    assert found.missing == len(choices)


def test_models_are_compared_on_the_questions_that_both_answered() -> None:
    before = lines("BBBAA!!")
    after = lines("AA-BA!A")
    found = compare_choices("baseline", "finetuned", before, after, 500, 0)
    assert found is not None
    assert (found.a, found.b, found.questions) == ("baseline", "finetuned", 5)
    assert (found.gained, found.lost) == (2, 1)
    assert found.p_value == mcnemar(2, 1)
    assert found.difference == pytest.approx(1 / 5)
    assert found.finding == "no measurable change"


def test_questions_are_matched_by_their_id_and_not_by_their_place() -> None:
    before = lines("AB")
    after = [*lines("B", start=1), *lines("A")]
    found = compare_choices("a", "b", before, after, 100, 0)
    assert found is not None
    assert (found.questions, found.gained, found.lost) == (2, 0, 0)
    assert (found.difference, found.p_value) == (0.0, 1.0)


@pytest.mark.parametrize(("before", "after"), [("AB", ""), ("", "AB"), ("!!", "AB"), ("A!", "!A")])
def test_without_a_shared_question_there_is_no_comparison(before: str, after: str) -> None:
    assert compare_choices("a", "b", lines(before), lines(after), 100, 0) is None


def test_a_clear_change_is_found_in_both_directions() -> None:
    poor, good = lines("B" * 40), lines("A" * 30 + "B" * 10)
    better = compare_choices("a", "b", poor, good, 500, 0)
    worse = compare_choices("b", "a", good, poor, 500, 0)
    assert better is not None
    assert worse is not None
    assert (better.finding, worse.finding) == ("improved", "worse")
    assert better.ci95 == (-worse.ci95[1], -worse.ci95[0])
    assert better.ci95[0] > 0


ENTRY = MultipleChoiceEval(name="first", dataset="samples", options=list("wxyz"), answer="cop")


def test_a_slice_shows_every_model_beside_chance_and_the_majority_letter() -> None:
    golds = "AABBBBCD"
    models = {
        "baseline": lines("AAAAAAAA", golds),
        "finetuned": lines("AABBBBAA", golds),
        "reference": lines("AABBBBC!", golds),
    }
    found = summarize_choices(ENTRY, "abc", models, 200, 0)
    assert (found.name, found.revision, found.questions, found.chance) == ("first", "abc", 8, 0.25)
    assert (found.majority_letter, found.majority_accuracy) == ("B", 0.5)
    assert {name: one.correct for name, one in found.models.items()} == {
        "baseline": 2,
        "finetuned": 6,
        "reference": 7,
    }
    assert [(c.a, c.b, c.questions, c.gained, c.lost) for c in found.comparisons] == [
        ("baseline", "finetuned", 8, 4, 0),
        ("finetuned", "reference", 7, 1, 0),
    ]


def test_without_a_reference_there_is_one_comparison() -> None:
    models = {"baseline": lines("AB"), "finetuned": lines("AA")}
    found = summarize_choices(ENTRY, None, models, 100, 0)
    assert [(c.a, c.b) for c in found.comparisons] == [("baseline", "finetuned")]
    silent = summarize_choices(ENTRY, None, models | {"reference": lines("!!")}, 100, 0)
    assert [(c.a, c.b) for c in silent.comparisons] == [("baseline", "finetuned")]
    assert silent.models["reference"].missing == 2
