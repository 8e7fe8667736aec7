"""All paired tests of the results are corrected together, and findings go by the corrected ones."""

import pytest

from job.evals.statistics import corrected, holm, paired_tests
from job.results import Evaluation, PairedTest
from tests.report import full


def evaluation(*p_values: float) -> Evaluation:
    """Two comparisons of accuracies and one of dialogues, each a change by its own p-value."""
    found = full()["evaluation"]
    found["dialogue"]["markers"] = []
    tests = [*found["multiple_choice"][0]["comparisons"], found["dialogue"]["comparison"]]
    for test, p_value in zip(tests, p_values, strict=True):
        test |= {"p_value": p_value, "p_holm": p_value, "finding": "improved"}
    return Evaluation.model_validate(found)


def values(tests: list[PairedTest]) -> list[tuple[float, float, str]]:
    return [(test.p_value, test.p_holm, test.finding) for test in tests]


def test_every_test_of_the_page_is_corrected_for_the_others() -> None:
    p_values = [0.04, 0.001, 0.02]
    found = paired_tests(corrected(evaluation(*p_values)))
    assert [test.p_value for test in found] == p_values
    assert [test.p_holm for test in found] == holm(p_values) == pytest.approx([0.04, 0.003, 0.04])


def test_a_change_that_may_be_one_of_many_chances_is_no_finding() -> None:
    found = paired_tests(corrected(evaluation(0.03, 0.2, 0.001)))
    assert [test.finding for test in found] == [
        "no measurable change",
        "no measurable change",
        "improved",
    ]


def test_a_correction_makes_no_finding() -> None:
    given = evaluation(0.001, 0.001, 0.001)
    dialogue = given.dialogue
    assert dialogue is not None
    unsure = dialogue.comparison.model_copy(update={"finding": "no measurable change"})
    given = given.model_copy(
        update={"dialogue": dialogue.model_copy(update={"comparison": unsure})}
    )
    assert values(paired_tests(corrected(given)))[2] == (0.001, 0.003, "no measurable change")


def test_correcting_twice_changes_nothing_and_the_rest_stays() -> None:
    given = evaluation(0.03, 0.2, 0.001)
    once = corrected(given)
    assert corrected(once) == once
    assert once.side_by_side == given.side_by_side
    assert once.multiple_choice[0].models == given.multiple_choice[0].models


def test_one_test_alone_is_not_corrected() -> None:
    alone = evaluation(0.03, 0.2, 0.001).model_copy(update={"multiple_choice": []})
    assert values(paired_tests(corrected(alone))) == [(0.001, 0.001, "improved")]
    nothing = alone.model_copy(update={"dialogue": None})
    assert corrected(nothing) == nothing
