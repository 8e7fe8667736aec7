"""The baseline and finetuned stages: the same evaluations, with and without the adapter.

The tuned model is made from the adapter's file, so what is measured is what was saved.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel

from job import logs
from job.data import contamination
from job.data.stage import TRAIN, VALIDATION, iter_examples, read_examples
from job.evals.dialogue import MOST_DIALOGUES, rouge_scores
from job.evals.engine import Engine
from job.evals.parsing import parse_choice
from job.evals.predictions import (
    DIALOGUE,
    SIDE_BY_SIDE,
    ChoiceLine,
    DialogueLine,
    SideLine,
    choice_line,
    write_predictions,
)
from job.evals.questions import Slice, load_slice, user_turn
from job.evals.side_by_side import side_prompts
from job.model.language_model import LanguageModel
from job.model.lora import Weights
from job.run import Run
from job.train.adapter_files import load_trained


class SliceOutcome(BaseModel):
    """Where the questions of a slice are from."""

    revision: str | None
    questions: int
    cut: int
    """Prompts that lost their beginning to `max_prompt_tokens`."""


class EvalOutcome(BaseModel):
    """What an evaluation stage found out; the figures are in the predictions files."""

    slices: dict[str, SliceOutcome]


def run_stage(run: Run, name: Literal["baseline", "finetuned"]) -> EvalOutcome:
    """Measure one model on every evaluation of the spec and keep each prediction."""
    model = run.model()
    weights = model.weights if name == "baseline" else _tuned(run, model)
    evals = run.spec.evals
    engine = Engine(model, evals.batch_size, evals.max_prompt_tokens, run.check)
    slices = {}
    loaded = [load_slice(entry, run.revisions) for entry in evals.multiple_choice]
    if name == "baseline" and loaded and run.processes.leads:
        _look_for_overlap(run, loaded)
    for found in loaded:
        entry = found.entry
        lines, cut = _multiple_choice(engine, model, weights, found)
        write_predictions(run, name, entry.name, lines)
        slices[entry.name] = SliceOutcome(
            revision=found.revision, questions=len(found.questions), cut=cut
        )
        correct = sum(line.correct for line in lines)
        logs.get().info(
            "answered",
            eval=entry.name,
            scoring=entry.scoring,
            questions=len(lines),
            correct=correct,
        )
    if evals.dialogue is not None:
        write_predictions(run, name, DIALOGUE, _dialogue(run, engine, model, weights))
    write_predictions(run, name, SIDE_BY_SIDE, _side_by_side(run, engine, model, weights))
    return EvalOutcome(slices=slices)


def _look_for_overlap(run: Run, slices: Sequence[Slice]) -> None:
    """Keep what the training examples share with the questions, and say so if they do."""
    found = contamination.find_overlap(slices, iter_examples(run.fetch(TRAIN)))
    run.put(contamination.KEY, found.model_dump_json(indent=2).encode())
    for name, overlap in found.slices.items():
        if overlap.found:
            logs.get().warning(
                "questions stand in the training text; data.checks.drop: [contaminated] drops "
                "those examples",
                eval=name,
                found=overlap.found,
                questions=overlap.questions,
                pairs=contamination.KEY,
            )


def _tuned(run: Run, model: LanguageModel) -> Weights:
    return model.adapted(*load_trained(run, model))


def _multiple_choice(
    engine: Engine, model: LanguageModel, weights: Weights, found: Slice
) -> tuple[list[ChoiceLine], int]:
    entry, questions = found.entry, found.questions
    turns = [model.codec.template.prompt(user_turn(entry, question)) for question in questions]
    prompts, cut = engine.encode(turns)
    if entry.scoring == "letters":
        letters = questions[0].letters
        scores = engine.letter_log_probabilities(weights, prompts, letters, entry.name)
        lines = []
        for question, row in zip(questions, scores, strict=True):
            by_letter = {letter: round(float(s), 6) for letter, s in zip(letters, row, strict=True)}
            best = letters[int(row.argmax())]
            lines.append(choice_line(question, best, log_probabilities=by_letter))
        return lines, cut
    answers = engine.generate(weights, prompts, entry.max_new_tokens, entry.name)
    return [
        choice_line(question, parse_choice(answer.text, question.options), answer=answer.text)
        for question, answer in zip(questions, answers, strict=True)
    ], cut


def _dialogue(
    run: Run, engine: Engine, model: LanguageModel, weights: Weights
) -> Sequence[DialogueLine]:
    wanted = run.spec.evals.dialogue
    assert wanted is not None
    examples = read_examples(run, VALIDATION, wanted.examples or MOST_DIALOGUES)
    prompts, cut = engine.encode(
        [model.codec.template.dialogue(e.prompt, e.system, e.history) for e in examples]
    )
    answers = engine.generate(weights, prompts, wanted.max_new_tokens, DIALOGUE)
    lines = []
    for example, answer in zip(examples, answers, strict=True):
        lines.append(
            DialogueLine(
                id=example.id,
                prompt=example.prompt,
                expected=example.response,
                answer=answer.text,
                tokens=answer.tokens,
                finish=answer.finish,
                **rouge_scores(example.response, answer.text),
            )
        )
    logs.get().info("dialogues answered", examples=len(lines), prompts_cut=cut)
    return lines


def _side_by_side(
    run: Run, engine: Engine, model: LanguageModel, weights: Weights
) -> Sequence[SideLine]:
    shown = side_prompts(run)
    if not shown:
        return []
    template = model.codec.template
    prompts, _ = engine.encode([template.dialogue(p.prompt, p.system, p.history) for p in shown])
    limit = run.spec.evals.side_by_side.max_new_tokens
    answers = engine.generate(weights, prompts, limit, "side by side")
    return [
        SideLine(id=p.id, prompt=p.prompt, expected=p.expected, answer=answer.text)
        for p, answer in zip(shown, answers, strict=True)
    ]
