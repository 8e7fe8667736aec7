"""The verdict: one sentence on whether fine-tuning changed anything, and by how much."""

from job.results import Comparison, Dialogue, Evaluation, Finding, MultipleChoiceResult, Verdict


def decide(evaluation: Evaluation) -> Verdict:
    """Return the verdict of a run.

    The benchmark is the task with the most questions, which can show the smallest change. The
    style is ROUGE-L of the answers to held-out prompts.
    """
    tasks = [(t, c) for t in evaluation.multiple_choice if (c := _before_after(t)) is not None]
    largest = max(tasks, key=lambda pair: pair[1].questions, default=None)
    dialogue = evaluation.dialogue
    benchmark = largest[1].finding if largest else None
    style = dialogue.comparison.finding if dialogue else None
    parts = [part for part in (_benchmark(largest), _style(dialogue)) if part]
    if not parts:
        return Verdict(sentence="Nothing was measured.", benchmark=None, style=None)
    return Verdict(
        sentence=f"{_headline(benchmark, style, dialogue)}: {'; '.join(parts)}.",
        benchmark=benchmark,
        style=style,
    )


def _before_after(result: MultipleChoiceResult) -> Comparison | None:
    return next((c for c in result.comparisons if (c.a, c.b) == ("baseline", "finetuned")), None)


_PHRASES: dict[Finding, str] = {
    "improved": "improved {what}",
    "worse": "made {what} worse",
    "no measurable change": "made no measurable change to {what}",
}


def _headline(benchmark: Finding | None, style: Finding | None, dialogue: Dialogue | None) -> str:
    the_benchmark, the_style = "the benchmark", "the similarity to the held-out answers"
    if style == "improved" and dialogue is not None and _below_trivial(dialogue):
        the_style += " (still below trivial baselines)"
    if benchmark is None or style is None:
        only = benchmark or style
        assert only is not None
        what = the_benchmark if style is None else the_style
        return f"Fine-tuning {_PHRASES[only].format(what=what)}"
    if benchmark == style:
        if benchmark == "no measurable change":
            return "Fine-tuning made no measurable change"
        return f"Fine-tuning {_PHRASES[benchmark].format(what=f'{the_benchmark} and {the_style}')}"
    first = _PHRASES[style].format(what=the_style)
    return f"Fine-tuning {first} but {_PHRASES[benchmark].format(what=the_benchmark)}"


def _trivial(dialogue: Dialogue) -> float:
    """Return the highest ROUGE-L of the trivial baselines."""
    scores = dialogue.nulls
    trivial = (scores.echoed_prompt, scores.other_answer, scores.polite_sentence)
    return max(estimate.mean for estimate in trivial)


def _below_trivial(dialogue: Dialogue) -> bool:
    return max(score.rougeL.mean for score in dialogue.models.values()) < _trivial(dialogue)


def _benchmark(largest: tuple[MultipleChoiceResult, Comparison] | None) -> str | None:
    if largest is None:
        return None
    task, comparison = largest
    before, after = task.models["baseline"], task.models["finetuned"]
    low, high = comparison.ci95
    return (
        f"{task.name} accuracy ({task.scoring}) went from {before.accuracy:.1%} to "
        f"{after.accuracy:.1%} on {comparison.questions} questions, a change of "
        f"{100 * comparison.difference:+.1f} points (95% interval {100 * low:+.1f} to "
        f"{100 * high:+.1f}, {_p_value(comparison)}; always answering "
        f"{task.majority_letter} scores {task.majority_accuracy:.1%})"
    )


def _p_value(comparison: Comparison) -> str:
    text = f"exact McNemar p = {comparison.p_value:#.2g}"
    if comparison.p_holm == comparison.p_value:
        return text
    return f"{text}, Holm-corrected p = {comparison.p_holm:#.2g}"


def _style(dialogue: Dialogue | None) -> str | None:
    if dialogue is None:
        return None
    before, after = dialogue.models["baseline"], dialogue.models["finetuned"]
    low, high = dialogue.comparison.ci95
    trivial = _trivial(dialogue)
    context = (
        f"both below the {trivial:.3f} of trivial baselines"
        if _below_trivial(dialogue)
        else f"trivial baselines score {trivial:.3f}"
    )
    return (
        f"ROUGE-L on {dialogue.examples} held-out dialogues went from {before.rougeL.mean:.3f} to "
        f"{after.rougeL.mean:.3f}, a change of {dialogue.comparison.difference:+.3f} (95% interval "
        f"{low:+.3f} to {high:+.3f}; {context})"
    )
