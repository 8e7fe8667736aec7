"""What a reader of the results should know: warnings at the top of the page, caveats at its end."""

from collections.abc import Iterator, Mapping
from typing import Any

from job.evals.metrics import BEFORE_AFTER
from job.report.plots import model_label, ordered, percent
from job.results import Results
from job.scores import (
    Estimate,
    MeanComparison,
    MultipleChoiceResult,
    TextTaskResult,
    TrivialBaselines,
)

FEW = 200
"""Examples below which the page warns about tests of means."""


def trivial_baselines(scores: TrivialBaselines) -> list[tuple[str, Estimate]]:
    """Return the trivial baselines by label, each with its score."""
    labels = ("Echoed prompt", "Shuffled answer", "Constant sentence")
    return [(label, score) for label, (_, score) in zip(labels, scores, strict=True)]


def warnings(results: Results) -> Iterator[str]:
    """Yield the findings that make the verdict doubtful, for the top of the page."""
    if results.model.chat_template_ignored:
        yield (
            "The model was prompted without its own chat template: its files carry one, but "
            f"model.chat_template is {results.model.chat_template}. Set it to auto."
        )
    yield from (sentence for share, sentence in _truncated_prompts(results) if share > 0.01)
    for task in results.evaluation.tasks:
        if task.trained_prompts:
            yield (
                f"{task.name}: {task.trained_prompts:,} of {task.samples:,} prompts are trained "
                "on too, so its score shows memory as well as skill."
            )
    for name, count, _, models in _evaluations(results):
        cut = [
            f"{score.truncated:,} of {count - score.missing:,} answers of {model_label(model)}"
            for model, score in ordered(models)
            if model in BEFORE_AFTER and score.truncated >= 0.9 * (count - score.missing) > 0
        ]
        if cut:
            yield (
                f"{name}: {' and '.join(cut)} were cut off at the limit of new tokens. Raise "
                "max_new_tokens, or check that model.chat_template is the format the model was "
                "trained in."
            )


def _evaluations(results: Results) -> Iterator[tuple[str, int, int, Mapping[str, Any]]]:
    """Yield each evaluation's name, prompts, truncated prompts, and scores of answers by model."""
    evaluation = results.evaluation
    for choice in evaluation.multiple_choice:
        yield choice.name, choice.questions, choice.truncated_prompts, choice.models
    if dialogue := evaluation.dialogue:
        yield "dialogue", dialogue.examples, dialogue.truncated_prompts, dialogue.models
    for task in evaluation.harness:
        yield task.name, task.samples, task.truncated, {}
    for task in evaluation.tasks:
        yield task.name, task.samples, task.truncated, task.scores
    shown = len(evaluation.side_by_side)
    yield "side by side", shown, evaluation.side_by_side_truncated_prompts, {}


def _truncated_prompts(results: Results) -> Iterator[tuple[float, str]]:
    """Yield the share of truncated prompts of each evaluation that has some, and a sentence."""
    for name, count, truncated, _ in _evaluations(results):
        if truncated:
            yield (
                truncated / count,
                f"{name}: {truncated:,} of {count:,} prompts were longer than "
                "evals.max_prompt_tokens and lost their beginning.",
            )


def left_out(choice: MultipleChoiceResult | TextTaskResult) -> str | None:
    """Describe the rows of a task that cannot be used, and why; None if there are none."""
    if choice.rows is None or not choice.rows.dropped:
        return None
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in choice.rows.dropped.items())
    return f"of {choice.rows.raw:,} rows read, {choice.rows.valid:,} are used; left out: {reasons}"


def caveats(results: Results) -> Iterator[str]:
    """Yield the limits of these results that a reader should know."""
    choices, dialogue = results.evaluation.multiple_choice, results.evaluation.dialogue
    if results.model.preset == "tiny":
        yield "The model is tiny, with random weights: this run only shows that the job works."
    yield (
        f"This is a single run with one seed ({results.run.spec.get('seed', 'not recorded')}). "
        "Intervals reflect the choice of questions, not the variance between training runs."
    )
    yield from (sentence for share, sentence in _truncated_prompts(results) if share <= 0.01)
    for choice in choices:
        yield from _choice_caveats(choice)
    if choices:
        yield (
            "Accuracy depends on the prompt and on the scoring mode (letters compares logits, "
            "generate parses text, best in English), by several points: compare only results of "
            "the same mode."
        )
    train = results.run.spec.get("train", {})
    if train.get("keep") == "best" or train.get("patience"):
        yield (
            "The checkpoint was chosen by the loss on the same held-out examples that are reported "
            "here, which favors the tuned model: measure on other examples before you rely on it."
        )
    scored = [*results.evaluation.harness, *results.evaluation.tasks]
    if sum(len(choice.comparisons) for choice in choices) + bool(dialogue) + len(scored) > 1:
        yield "Findings are based on p-values corrected for multiple comparisons (Holm)."
    parts = [part for part in (dialogue, results.evaluation.loss, *scored) if part]
    means = [part.comparison for part in parts if isinstance(part.comparison, MeanComparison)]
    if fewest := min((test.examples for test in means if test.examples < FEW), default=0):
        yield (
            f"Means over {fewest:,} held-out examples are uncertain: with fewer than {FEW}, tests "
            "of means are only roughly right."
        )
    if dialogue:
        yield (
            "ROUGE and chrF measure overlap with one expected answer, not correctness, and depend "
            f"on the length of the answers (at most {dialogue.max_new_tokens:,} tokens here)."
        )
        trivial = max(estimate.mean for _, estimate in trivial_baselines(dialogue.nulls))
        for name, rouge in ordered(dialogue.models):
            if rouge.rougeL.ci95[0] <= trivial:
                yield f"ROUGE-L of {model_label(name)} is not measurably above trivial baselines."
    if shared := results.data.shared_prompts:
        yield (
            f"{shared:,} of {results.data.validation:,} held-out examples have an opening prompt "
            f"that is trained on too: data.group separates them by {results.data.grouped_by}."
        )
    if truncated := results.training.truncated:
        yield f"{truncated:,} training examples were longer than the limit and were truncated."
    if results.reference.status != "skipped":
        yield "The reference is remote: its provider may change weights and settings at any time."


def _choice_caveats(choice: MultipleChoiceResult) -> Iterator[str]:
    widths = [score.ci95[1] - score.ci95[0] for score in choice.models.values()]
    if widths:
        yield (
            f"{choice.name}: with {choice.questions:,} questions, accuracy is uncertain by about "
            f"\u00b1{50 * max(widths):.1f} points (95%); use the paired comparison for changes."
        )
    if rows := left_out(choice):
        yield f"{choice.name}: {rows}."
    if choice.in_training_text:
        yield (
            f"{choice.name}: {choice.in_training_text:,} questions share a passage with the "
            "training text (evals/contamination.json lists them)."
        )
    for name, score in ordered(choice.models):
        label, answered = model_label(name), sum(score.letters.values())
        if score.ci95[0] <= choice.majority_accuracy:
            yield (
                f"{choice.name}: {label} is not measurably above always answering "
                f"{choice.majority_letter} ({percent(choice.majority_accuracy)})."
            )
        for letter, chosen in score.letters.items():
            if chosen > 0.6 * answered:
                share = percent(chosen / answered)
                yield f"{choice.name}: {label} chose {letter} in {share} of its answers."
        if score.missing:
            missing = f"{score.missing:,} questions have no answer of {label}"
            yield f"{choice.name}: {missing}; its accuracy does not count them."
