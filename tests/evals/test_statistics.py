"""Intervals and tests have published and hand-computed values; Holm covers all tests."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.evals.paired import compare_means, compare_proportions, decide_findings, paired_tests
from job.evals.statistics import (
    Bootstrap,
    bootstrap_mean,
    detectable_mean,
    mcnemar,
    mcnemar_power,
    sign_flip_test,
    wilson,
)
from job.scores import (
    Comparison,
    Evaluation,
    Finding,
    LossComparison,
    MeanComparison,
)
from tests.report import full


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_gives_the_published_intervals(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_without_trials_is_0_to_1() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_wilson_contains_the_proportion_and_mirrors(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = wilson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    assert wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (5, 0, 2 / 2**5),
        (6, 0, 2 / 2**6),
        (0, 10, 2 / 2**10),
        (10, 2, 2 * (1 + 12 + 66) / 2**12),
        (7, 3, 2 * (1 + 10 + 45 + 120) / 2**10),
        (86, 150, 3.716e-05),  # Fay, exact2x2: approval ratings of Agresti 1990
    ],
)
def test_mcnemar_gives_the_exact_p_values(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p_value, rel=1e-3)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_two_sided(gained: int, lost: int) -> None:
    assert mcnemar(gained, lost) == mcnemar(lost, gained)
    assert 0 < mcnemar(gained, lost) <= 1


VALUES = st.lists(st.floats(-1, 1), min_size=1, max_size=40)


@given(VALUES, st.integers(0, 99))
@settings(deadline=None)
def test_bootstrap_interval_contains_the_mean(values: list[float], seed: int) -> None:
    estimate = bootstrap_mean(values, Bootstrap(200, seed))
    low, high = estimate.ci95
    assert estimate.mean == pytest.approx(math.fsum(values) / len(values))
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


@given(VALUES, st.integers(0, 99))
@settings(deadline=None)
def test_bootstrap_interval_mirrors_and_shifts(values: list[float], seed: int) -> None:
    low, high = bootstrap_mean(values, Bootstrap(200, seed)).ci95
    mirrored = bootstrap_mean([-value for value in values], Bootstrap(200, seed)).ci95
    moved = bootstrap_mean([value + 3 for value in values], Bootstrap(200, seed)).ci95
    assert mirrored == pytest.approx((-high, -low))
    assert moved == pytest.approx((low + 3, high + 3))


def test_bootstrap_interval_depends_on_the_seed() -> None:
    values = np.random.default_rng(0).normal(size=100).tolist()
    assert bootstrap_mean(values, Bootstrap(500, 7)) == bootstrap_mean(values, Bootstrap(500, 7))
    assert (
        bootstrap_mean(values, Bootstrap(500, 7)).ci95
        != bootstrap_mean(values, Bootstrap(500, 8)).ci95
    )


def test_equal_values_give_an_empty_interval() -> None:
    assert bootstrap_mean([0.25], Bootstrap(100, 0)).ci95 == (0.25, 0.25)
    assert bootstrap_mean([1.0] * 50, Bootstrap(100, 0)).ci95 == (1.0, 1.0)


def test_bootstrap_interval_is_normal_with_many_values() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, size=6000)
    low, high = bootstrap_mean(values.tolist(), Bootstrap(2000, 0)).ci95
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx(
        (values.mean() - error, values.mean() + error), abs=error * 0.1
    )


def test_bootstrap_interval_covers_the_mean_95_percent() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for seed in range(400):
        low, high = bootstrap_mean(
            generator.normal(1.0, size=60).tolist(), Bootstrap(400, seed)
        ).ci95
        covered += low <= 1.0 <= high
    assert 360 <= covered <= 392


def evaluation(*p_values: float) -> Evaluation:
    """Return tests: tuning on questions and dialogues, then the reference and a style trait."""
    document = full()["evaluation"]
    dialogue = document["dialogue"]
    tuned, reference = document["multiple_choice"][0]["comparisons"]
    tests = [tuned, dialogue["comparison"], reference, dialogue["markers"][0]["comparison"]]
    families = ["primary", "primary", "secondary", "secondary"]
    for test, family, p_value in zip(tests, families, p_values, strict=True):
        test |= {"p_value": p_value, "p_holm": p_value, "family": family, "difference": 0.1}
    dialogue["comparison"]["detectable"] = 0.02
    return Evaluation.model_validate(document)


def test_tests_are_corrected_for_the_others_of_their_family() -> None:
    tests = list(paired_tests(decide_findings(evaluation(0.04, 0.001, 0.02, 0.03))))
    by_p_value = {test.p_value: (test.p_holm, test.finding) for test in tests}
    assert by_p_value == {
        0.04: (0.04, "improved"), 0.001: (0.002, "improved"),
        0.02: (0.04, "improved"), 0.03: (0.04, "improved"),
    }  # fmt: skip


def test_a_reference_does_not_change_whether_tuning_helped() -> None:
    """With all tests in one family, 0.02 of four would be 0.06."""
    for reference in (0.9, 1e-9):
        tests = list(paired_tests(decide_findings(evaluation(0.02, 0.5, reference, 0.5))))
        assert [t.finding for t in tests if t.p_value == 0.02] == ["improved"]


def test_detectable_effects_are_those_of_the_level_in_use() -> None:
    """At the 5% level of a lone test, power at the stated effect would be too low."""
    alone = evaluation(0.5, 0.5, 0.5, 0.5).model_copy(update={"dialogue": None})
    (single, *_) = paired_tests(decide_findings(alone))
    (shared, *_) = paired_tests(decide_findings(evaluation(0.5, 0.5, 0.5, 0.5)))
    assert isinstance(single, Comparison)
    share = (single.gained + single.lost) / single.questions
    for test, level in ((single, 0.05), (shared, 0.025)):
        assert test.detectable is not None
        power = mcnemar_power(4183, share, test.detectable, level)
        assert power == pytest.approx(0.8, abs=0.002)


@pytest.mark.parametrize(
    ("examples", "shift", "finding"),
    [
        (49, 1.0, "not enough evidence"),
        (49, 0.0, "not enough evidence"),
        (50, 1.0, "improved"),
        (50, -1.0, "worse"),
        (200, 0.0, "no measurable change"),
    ],
)
def test_means_of_few_items_are_not_enough_evidence(
    examples: int, shift: float, finding: Finding
) -> None:
    noise = np.random.default_rng(0).normal(size=examples)
    noise -= noise.mean()
    before = {str(i): 0.0 for i in range(examples)}
    after = {str(i): float(value) + shift for i, value in enumerate(noise)}
    for kind, expected in ((MeanComparison, finding), (LossComparison, MIRRORED[finding])):
        test = compare_means(kind, ("a", "b"), before, after, Bootstrap(200, 0), "primary")
        assert test is not None
        assert decide_findings(test).finding == expected


MIRRORED: dict[Finding, Finding] = {
    "improved": "worse", "worse": "improved", "no measurable change": "no measurable change",
    "not enough evidence": "not enough evidence",
}  # fmt: skip


@pytest.mark.parametrize(
    ("gained", "lost", "same", "finding"),
    [
        (8, 0, 2, "improved"),  # exact with ten questions too
        (0, 8, 2, "worse"),
        (2, 1, 7, "not enough evidence"),
        (6, 5, 189, "no measurable change"),
        (0, 0, 4000, "no measurable change"),
    ],
)
def test_few_questions_decide_only_if_the_exact_test_does(
    gained: int, lost: int, same: int, finding: Finding
) -> None:
    changes = [1] * gained + [-1] * lost + [0] * same
    before = {str(i): change < 0 for i, change in enumerate(changes)}
    after = {str(i): change > 0 for i, change in enumerate(changes)}
    test = compare_proportions(("a", "b"), before, after, "primary")
    assert test is not None
    assert decide_findings(test).finding == finding


def test_detectable_means_are_found_four_times_in_five() -> None:
    generator = np.random.default_rng(7)
    found = 0
    for seed in range(100):
        differences = generator.normal(size=50)
        effect = detectable_mean(differences.tolist())
        assert effect is not None
        moved = differences - differences.mean() + generator.normal(effect, 50**-0.5)
        found += sign_flip_test(moved.tolist(), Bootstrap(0, seed))[1] < 0.05
    assert 68 <= found <= 92  # 80 expected, within 3 standard deviations


@pytest.mark.parametrize(
    ("gained", "lost", "same", "finding"),
    [
        (20, 20, 3960, "not worse"),
        (100, 130, 9770, "not worse"),  # a drop that is certain, but below one point
        (5, 200, 3795, "worse"),
        (20, 20, 160, "cannot tell"),
        (0, 0, 40, "cannot tell"),
    ],
)
def test_retention_is_judged_by_the_margin(
    gained: int, lost: int, same: int, finding: Finding
) -> None:
    changes = [1] * gained + [-1] * lost + [0] * same
    before = {str(i): change < 0 for i, change in enumerate(changes)}
    after = {str(i): change > 0 for i, change in enumerate(changes)}
    test = compare_proportions(("a", "b"), before, after, "retention", 0.01)
    assert test is not None
    assert decide_findings(test).finding == finding


@pytest.mark.parametrize(
    ("drop", "scale", "finding"),
    [(0.0, 0.1, "not worse"), (0.3, 0.1, "worse"), (0.0, 0.3, "cannot tell")],
)
def test_retention_of_means_is_judged_by_the_margin(
    drop: float, scale: float, finding: Finding
) -> None:
    noise = np.random.default_rng(1).normal(scale=scale, size=400)
    noise -= noise.mean() + drop
    before = {str(i): 0.5 for i in range(400)}
    after = {str(i): 0.5 + float(value) for i, value in enumerate(noise)}
    bootstrap = Bootstrap(200, 0)
    test = compare_means(MeanComparison, ("a", "b"), before, after, bootstrap, "retention", 0.02)
    assert test is not None
    assert decide_findings(test).finding == finding
