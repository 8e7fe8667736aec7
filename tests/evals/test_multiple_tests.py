"""Holm's correction covers all paired tests of the results, and findings follow it."""

import pytest

from job.evals.statistics import apply_holm, holm, paired_tests
from job.results import Evaluation, PairedTest
from tests.report import full


def evaluation(*p_values: float) -> Evaluation:
    """Return two comparisons of accuracies and one of dialogues, each a change on its own."""
    document = full()["evaluation"]
    document["dialogue"]["markers"] = []
    tests = [*document["multiple_choice"][0]["comparisons"], document["dialogue"]["comparison"]]
    for test, p_value in zip(tests, p_values, strict=True):
        test |= {"p_value": p_value, "p_holm": p_value, "finding": "improved"}
    return Evaluation.model_validate(document)


def values(tests: list[PairedTest]) -> list[tuple[float, float, str]]:
    return [(test.p_value, test.p_holm, test.finding) for test in tests]


def test_every_test_is_corrected_for_the_others() -> None:
    p_values = [0.04, 0.001, 0.02]
    tests = paired_tests(apply_holm(evaluation(*p_values)))
    assert [test.p_value for test in tests] == p_values
    assert [test.p_holm for test in tests] == holm(p_values) == pytest.approx([0.04, 0.003, 0.04])


def test_the_correction_removes_findings() -> None:
    tests = paired_tests(apply_holm(evaluation(0.03, 0.2, 0.001)))
    assert [test.finding for test in tests] == [
        "no measurable change",
        "no measurable change",
        "improved",
    ]


def test_the_correction_adds_no_finding() -> None:
    given = evaluation(0.001, 0.001, 0.001)
    dialogue = given.dialogue
    assert dialogue is not None
    unsure = dialogue.comparison.model_copy(update={"finding": "no measurable change"})
    given = given.model_copy(
        update={"dialogue": dialogue.model_copy(update={"comparison": unsure})}
    )
    assert values(paired_tests(apply_holm(given)))[2] == (0.001, 0.003, "no measurable change")


def test_correcting_twice_changes_nothing() -> None:
    given = evaluation(0.03, 0.2, 0.001)
    once = apply_holm(given)
    assert apply_holm(once) == once
    assert once.side_by_side == given.side_by_side
    assert once.multiple_choice[0].models == given.multiple_choice[0].models


def test_a_single_test_is_not_corrected() -> None:
    alone = evaluation(0.03, 0.2, 0.001).model_copy(update={"multiple_choice": []})
    assert values(paired_tests(apply_holm(alone))) == [(0.001, 0.001, "improved")]
    nothing = alone.model_copy(update={"dialogue": None})
    assert apply_holm(nothing) == nothing
