"""The verdict: one sentence that says whether fine-tuning changed anything, and by how much."""

from job.results import Comparison, Dialogue, Evaluation, Finding, MultipleChoiceResult, Verdict


def decide(evaluation: Evaluation) -> Verdict:
    """The verdict of a run.

    The benchmark is judged by the slice with the most questions (the one that can show the
    smallest change), the style of the answers by ROUGE-L against the held-out ones.
    """
    slices = [(s, c) for s in evaluation.multiple_choice if (c := _before_after(s)) is not None]
    largest = max(slices, key=lambda pair: pair[1].questions, default=None)
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


def _before_after(found: MultipleChoiceResult) -> Comparison | None:
    return next((c for c in found.comparisons if (c.a, c.b) == ("baseline", "finetuned")), None)


_SAID: dict[Finding, str] = {
    "improved": "improved {what}",
    "worse": "made {what} worse",
    "no measurable change": "made no measurable change to {what}",
}


def _headline(benchmark: Finding | None, style: Finding | None, dialogue: Dialogue | None) -> str:
    the_benchmark, the_style = "the benchmark", "how close the answers are to the held-out ones"
    if style == "improved" and dialogue is not None and _below_null(dialogue):
        the_style += " (still short of answers that know nothing)"
    if benchmark is None or style is None:
        only = benchmark or style
        assert only is not None
        what = the_benchmark if style is None else the_style
        return f"Fine-tuning {_SAID[only].format(what=what)}"
    if benchmark == style:
        if benchmark == "no measurable change":
            return "Fine-tuning made no measurable change"
        return f"Fine-tuning {_SAID[benchmark].format(what=f'{the_benchmark} and {the_style}')}"
    first, second = _SAID[style].format(what=the_style), _SAID[benchmark].format(what=the_benchmark)
    return f"Fine-tuning {first} but {second}"


def _null(dialogue: Dialogue) -> float:
    nulls = dialogue.nulls
    known = (nulls.echoed_prompt, nulls.other_answer, nulls.polite_sentence)
    return max(null.mean for null in known)


def _below_null(dialogue: Dialogue) -> bool:
    return max(score.rougeL.mean for score in dialogue.models.values()) < _null(dialogue)


def _benchmark(found: tuple[MultipleChoiceResult, Comparison] | None) -> str | None:
    if found is None:
        return None
    slice_, comparison = found
    before, after = slice_.models["baseline"], slice_.models["finetuned"]
    low, high = comparison.ci95
    return (
        f"{slice_.name} accuracy ({slice_.scoring}) went from {before.accuracy:.1%} to "
        f"{after.accuracy:.1%} on {comparison.questions} questions, a change of "
        f"{100 * comparison.difference:+.1f} points (95% interval {100 * low:+.1f} to "
        f"{100 * high:+.1f}, {_tested(comparison)}; always answering "
        f"{slice_.majority_letter} scores {slice_.majority_accuracy:.1%})"
    )


def _tested(comparison: Comparison) -> str:
    said = f"exact McNemar p = {comparison.p_value:.2g}"
    if comparison.p_holm == comparison.p_value:
        return said
    return f"{said}, corrected for the other tests {comparison.p_holm:.2g}"


def _style(dialogue: Dialogue | None) -> str | None:
    if dialogue is None:
        return None
    before, after = dialogue.models["baseline"], dialogue.models["finetuned"]
    low, high = dialogue.comparison.ci95
    null = _null(dialogue)
    beside = (
        f"both below the {null:.3f} of answers that know nothing"
        if _below_null(dialogue)
        else f"answers that know nothing score {null:.3f}"
    )
    return (
        f"ROUGE-L on {dialogue.examples} held-out dialogues went from {before.rougeL.mean:.3f} to "
        f"{after.rougeL.mean:.3f}, a change of {dialogue.comparison.difference:+.3f} (95% interval "
        f"{low:+.3f} to {high:+.3f}; {beside})"
    )
