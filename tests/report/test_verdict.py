"""The verdict is a plain sentence that says no more than the tests show."""

from typing import Any

import pytest

from job.report.verdict import decide
from job.results import Verdict
from job.scores import Evaluation, Finding
from tests.report import full

SAME: Finding = "no measurable change"
FEW: Finding = "not enough evidence"


def verdict(
    questions: Finding | None = None,
    likeness: Finding | None = None,
    loss: Finding | None = None,
    **changes: Any,
) -> Verdict:
    """Decide on findings of 4,183 questions, 200 dialogues and the loss; None is not measured."""
    document = full()["evaluation"]
    (task,), dialogue = document["multiple_choice"], document["dialogue"]
    task["comparisons"] = task["comparisons"][:1]
    task["comparisons"][0]["finding"] = questions or SAME
    dialogue["comparison"] |= {"finding": likeness or SAME, "detectable": 0.012}
    dialogue["models"]["finetuned"]["rougeL"]["mean"] = changes.get("rouge", 0.153)
    comparison = dialogue["comparison"] | {"finding": loss or SAME}
    scores = {"baseline": 3.433, "finetuned": 3.099}
    measured = {
        "examples": 200, "tokens": 9000, "comparison": comparison,
        "lower": {"count": 190, "of": 200, "share": 0.95, "ci95": [0.9, 0.98]},
        "models": {
            name: {"mean": value, "by_example": {"mean": value, "ci95": [3, 4]}}
            for name, value in scores.items()
        },
    }  # fmt: skip
    document |= {
        "multiple_choice": [task] if questions else [],
        "harness": changes.get("harness", []),
        "dialogue": dialogue if likeness else None,
        "loss": measured if loss else None,
    }
    return decide(Evaluation.model_validate(document))


ROSE = "likeness to your answers rose from 0.109 to 0.153"
UNCLEAR = (
    "no clear change of medmcqa accuracy (from 31.0% to 35.1%; a change of 2.0 points would "
    "probably have shown)"
)


@pytest.mark.parametrize(
    ("findings", "answer", "sentence"),
    [
        ((SAME, "improved"), "better", f"Fine-tuning helped: {ROSE}; {UNCLEAR}."),
        (
            ("improved", SAME),
            "better",
            "Fine-tuning helped: medmcqa accuracy rose from 31.0% to 35.1%; no clear change of "
            "likeness to your answers (from 0.109 to 0.153; a change of 0.012 would probably "
            "have shown).",
        ),
        (("worse", SAME), "worse", "Fine-tuning hurt: medmcqa accuracy fell from 31.0%"),
        (
            ("worse", "improved"),
            "better and worse",
            f"Fine-tuning helped in one way and hurt in another: {ROSE}; medmcqa accuracy fell",
        ),
        ((SAME, None), "no clear change", f"Fine-tuning made no clear change: {UNCLEAR}."),
        (
            (None, FEW),
            "not enough evidence",
            "Fine-tuning cannot be judged on so little evidence: 200 held-out dialogues are too "
            "few to judge likeness to your answers (from 0.109 to 0.153).",
        ),
        ((FEW, SAME), "no clear change", "Fine-tuning made no clear change: no clear change of"),
        (
            (SAME, None, "improved"),
            "no clear change",
            f"Fine-tuning made no clear change: {UNCLEAR}; it learned the data: the loss on "
            "held-out responses fell (3.433 to 3.099).",
        ),
        (
            (None, None, "improved"),
            "better",
            "Fine-tuning helped: it learned the data: the loss on held-out responses fell",
        ),
        ((), "not enough evidence", "Fine-tuning cannot be judged on so little evidence: nothing"),
    ],
)
def test_the_sentence_says_what_each_test_found(
    findings: tuple[Finding | None, ...], answer: str, sentence: str
) -> None:
    decided = verdict(*findings)
    assert decided.sentence.startswith(sentence)
    assert decided.answer == answer
    names = ("benchmark", "style", "loss")
    assert {n: getattr(decided, n) for n in names} == dict(
        zip(names, (*findings, None, None, None), strict=False)
    )


@pytest.mark.parametrize(
    ("findings", "step"),
    [
        (("improved", None), "Read the answers side by side; if you agree, use the adapter."),
        (("worse", "improved"), "Do not use the adapter as it is:"),
        ((FEW, None), "Measure more: 4,183 questions were measured; 50 are the least"),
        ((SAME, SAME, "improved"), "Read the answers side by side. More questions"),
        ((SAME, SAME, SAME), "Train longer, or with a higher learning rate"),
    ],
)
def test_there_is_one_next_step(findings: tuple[Finding | None, ...], step: str) -> None:
    assert verdict(*findings).next_step.startswith(step)


def test_scores_below_those_of_no_model_are_said() -> None:
    low = verdict(None, "improved", rouge=0.11)
    assert "rose from 0.109 to 0.110, below the 0.111 of answers that need no model" in low.sentence
    assert "need no model" not in verdict(None, "improved").sentence


def test_a_reference_does_not_hide_that_both_are_below() -> None:
    """Only the best of all models counted once, and that was the reference."""
    document = full()["evaluation"]
    dialogue = document["dialogue"]
    dialogue["models"]["reference"] = dialogue["models"]["finetuned"]
    dialogue["models"]["finetuned"] = dialogue["models"]["baseline"]
    dialogue["comparison"]["finding"] = "improved"
    sentence = decide(Evaluation.model_validate(document)).sentence
    assert "to 0.109, below the 0.111 of answers that need no model" in sentence


def test_the_benchmark_is_the_task_with_the_most_questions() -> None:
    document = full()["evaluation"]
    (large,) = document["multiple_choice"]
    small = {**large, "name": "small", "comparisons": [{**large["comparisons"][0], "questions": 9}]}
    small["comparisons"][0]["finding"] = "worse"
    document["multiple_choice"] = [small, large]
    assert decide(Evaluation.model_validate(document)).benchmark == "improved"


def kept(finding: Finding, name: str = "arc") -> dict[str, Any]:
    """A retention task of lm-evaluation-harness."""
    (task,) = full()["evaluation"]["multiple_choice"]
    comparison = task["comparisons"][0] | {
        "family": "retention", "margin": 0.01, "p_not_worse": 0.2, "finding": finding,
        "questions": 400, "gained": 20, "lost": 20,
    }  # fmt: skip
    scores = {"baseline": 0.5, "finetuned": 0.49}
    return {
        "name": name, "task": name, "metric": "acc", "samples": 400, "truncated": 0,
        "models": scores, "comparison": comparison,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("harness", "answer", "said"),
    [
        (
            [kept("not worse"), kept("not worse", "hellaswag")],
            "better",
            "; worse nowhere by more than 1 point (arc acc, hellaswag acc).",
        ),
        ([kept("worse")], "better and worse", "; arc acc fell from 50.0% to 49.0%."),
        (
            [kept("cannot tell")],
            "better",
            "; 400 samples are too few to tell whether arc acc got worse (from 50.0% to 49.0%); "
            "about 6,183 would do.",
        ),
        (
            [kept("not worse"), kept("cannot tell", "hellaswag")],
            "better",
            "; not worse by more than 1 point (arc acc); 400 samples are too few",
        ),
    ],
)
def test_retention_is_said_in_its_own_words(
    harness: list[dict[str, Any]], answer: str, said: str
) -> None:
    decided = verdict("improved", harness=harness)
    assert decided.answer == answer
    assert said in decided.sentence


def test_a_loss_elsewhere_is_the_verdict_where_nothing_else_changed() -> None:
    assert verdict(SAME, harness=[kept("worse")]).answer == "worse"
