"""The verdict says no more than the tests show."""

import pytest

from job.report.verdict import decide
from job.results import (
    Comparison,
    Dialogue,
    DialogueComparison,
    DialogueScore,
    Estimate,
    Evaluation,
    Finding,
    ModelScore,
    MultipleChoiceResult,
    TrivialBaselines,
)


def score(correct: int, questions: int) -> ModelScore:
    accuracy = correct / questions
    return ModelScore(
        correct=correct, unparsed=0, missing=0, accuracy=accuracy, ci95=(0, 1), letters={}
    )


def questions(
    finding: Finding, number: int = 100, name: str = "medmcqa", p_holm: float = 0.42
) -> MultipleChoiceResult:
    comparison = Comparison(
        a="baseline", b="finetuned", questions=number, gained=9, lost=5, p_value=0.42,
        p_holm=p_holm, difference=0.04, ci95=(-0.03, 0.11), finding=finding, detectable=0.11,
    )  # fmt: skip
    return MultipleChoiceResult(
        name=name, scoring="letters", dataset="d", revision=None, questions=number, chance=0.25,
        majority_letter="A", majority_accuracy=0.322, comparisons=[comparison],
        detectable_at_worst=0.2,
        models={"baseline": score(30, number), "finetuned": score(34, number)},
    )  # fmt: skip


def dialogue(finding: Finding, after: float = 0.2) -> Dialogue:
    def scores(value: float) -> DialogueScore:
        estimate = Estimate(mean=value, ci95=(value, value))
        return DialogueScore(
            rouge1=estimate, rouge2=estimate, rougeL=estimate, mean_tokens=9, truncated=0
        )

    null = Estimate(mean=0.106, ci95=(0.1, 0.11))
    return Dialogue(
        examples=20, max_new_tokens=64,
        models={"baseline": scores(0.05), "finetuned": scores(after)},
        nulls=TrivialBaselines(echoed_prompt=null, other_answer=null, polite_sentence=null),
        comparison=DialogueComparison(
            a="baseline", b="finetuned", examples=20, difference=0.15, ci95=(0.1, 0.2),
            p_value=0.001, p_holm=0.001, finding=finding,
        ),
    )  # fmt: skip


SAME: Finding = "no measurable change"


@pytest.mark.parametrize(
    ("benchmark", "style", "headline"),
    [
        (SAME, SAME, "Fine-tuning made no measurable change:"),
        (SAME, None, "Fine-tuning made no measurable change to the benchmark:"),
        ("worse", None, "Fine-tuning made the benchmark worse:"),
        (None, "improved", "Fine-tuning improved the similarity to the held-out answers:"),
        ("improved", "improved", "Fine-tuning improved the benchmark and the similarity"),
        (SAME, "improved", "but made no measurable change to the benchmark:"),
        ("worse", "improved", "but made the benchmark worse:"),
        (
            "improved",
            "worse",
            "Fine-tuning made the similarity to the held-out answers worse",
        ),
    ],
)
def test_headline_states_the_finding_of_each_test(
    benchmark: Finding | None, style: Finding | None, headline: str
) -> None:
    verdict = decide(
        Evaluation(
            multiple_choice=[questions(benchmark)] if benchmark else [],
            dialogue=dialogue(style) if style else None,
            side_by_side=[],
        )
    )
    assert headline in verdict.sentence
    assert (verdict.benchmark, verdict.style) == (benchmark, style)


def test_benchmark_is_the_task_with_the_most_questions() -> None:
    tasks = [questions("improved", 100, "small"), questions(SAME, 4183, "large")]
    verdict = decide(Evaluation(multiple_choice=tasks, dialogue=None, side_by_side=[]))
    assert verdict.benchmark == SAME
    assert "large accuracy (letters)" in verdict.sentence
    assert "on 4183 questions" in verdict.sentence


def test_scores_are_compared_with_trivial_baselines() -> None:
    tasks = [questions(SAME)]
    high = decide(Evaluation(multiple_choice=tasks, dialogue=dialogue("improved"), side_by_side=[]))
    assert "30.0% to 34.0%" in high.sentence
    assert "p = 0.42; always answering A scores 32.2%" in high.sentence
    assert "trivial baselines score 0.106" in high.sentence
    low = decide(
        Evaluation(multiple_choice=[], dialogue=dialogue("improved", 0.09), side_by_side=[])
    )
    assert "both below the 0.106 of trivial baselines" in low.sentence


def test_a_corrected_p_value_follows_the_raw_one() -> None:
    tasks = [questions(SAME, p_holm=0.84)]
    verdict = decide(Evaluation(multiple_choice=tasks, dialogue=None, side_by_side=[]))
    assert "p = 0.42, Holm-corrected p = 0.84; always" in verdict.sentence


def test_no_evaluation_says_nothing_was_measured() -> None:
    verdict = decide(Evaluation(multiple_choice=[], dialogue=None, side_by_side=[]))
    assert verdict.sentence == "Nothing was measured."
