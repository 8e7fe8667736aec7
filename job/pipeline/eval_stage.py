"""The baseline and finetuned stages: the same evaluations, with and without the adapter.

The tuned model is made from the adapter's file, so what is measured is what was saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel

from job.chat.conversation import Message
from job.data import contamination
from job.evals.answer_parsing import parse_choice
from job.evals.batching import BATCHING_VERSION
from job.evals.engine import Engine
from job.evals.metrics import rouge_scores
from job.evals.prediction_cache import PredictionCaches
from job.evals.predictions import (
    DIALOGUE,
    SIDE_BY_SIDE,
    ChoiceLine,
    DialogueLine,
    SideLine,
    choice_line,
    format_predictions,
    predictions_key,
)
from job.evals.tasks import Question, Task, before_letter, load_task, question_prompts
from job.model.language_model import LanguageModel
from job.model.lora import Weights
from job.pipeline.data_stage import TRAIN, VALIDATION, iter_examples, read_examples
from job.pipeline.run import Run
from job.pipeline.train_stage import load_trained
from job.runtime import logs
from job.spec.schema import DialogueEval


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
    engine = Engine(model, evals.batch_size, evals.max_prompt_tokens, run.coordinated_stop.check)
    loaded = [load_task(entry, run.revisions) for entry in evals.multiple_choice]
    if name == "baseline" and loaded and run.processes.is_primary:
        _look_for_overlap(run, loaded)
    inputs = [run.digests[name], engine.batch_size, BATCHING_VERSION]
    with PredictionCaches(run.store, name, inputs, run.processes.broadcast) as done:
        measured = _Measured(run, name, engine, model, weights, done)
        slices = {found.entry.name: measured.multiple_choice(found) for found in loaded}
        if evals.dialogue is not None:
            measured.dialogue(evals.dialogue)
        measured.side_by_side()
    return EvalOutcome(slices=slices)


def _look_for_overlap(run: Run, slices: Sequence[Task]) -> None:
    """Keep what the training examples share with the questions, and say so if they do."""
    questions = {
        task.entry.name: {question.id: question.text for question in task.questions}
        for task in slices
    }
    found = contamination.find_overlap(questions, iter_examples(run.fetch(TRAIN)))
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


@dataclass(frozen=True)
class _Measured:
    """One model that is measured: its weights, and what is on file of it already."""

    run: Run
    name: Literal["baseline", "finetuned"]
    engine: Engine
    model: LanguageModel
    weights: Weights
    done: PredictionCaches

    def multiple_choice(self, found: Task) -> SliceOutcome:
        """Answer the questions of a slice."""
        entry, questions = found.entry, found.questions
        prompts, cut = self.engine.encode(question_prompts(found))
        kept = self.done.open(entry.name)
        if entry.scoring == "letters":
            letters = questions[0].letters
            tokens = self.model.codec.letter_tokens(letters, *before_letter(entry))
            scores = self.engine.loglikelihood(self.weights, prompts, tokens, entry.name, kept)
            lines = [_scored(q, letters, row) for q, row in zip(questions, scores, strict=True)]
        else:
            answers = self.engine.generate(
                self.weights, prompts, entry.max_new_tokens, entry.name, kept
            )
            lines = [
                choice_line(q, parse_choice(answer.text, q.options), answer=answer.text)
                for q, answer in zip(questions, answers, strict=True)
            ]
        self.run.put(predictions_key(self.name, entry.name), format_predictions(lines))
        correct = sum(line.correct for line in lines)
        logs.get().info(
            "answered",
            eval=entry.name,
            scoring=entry.scoring,
            questions=len(lines),
            correct=correct,
        )
        return SliceOutcome(revision=found.revision, questions=len(questions), cut=cut)

    def dialogue(self, wanted: DialogueEval) -> None:
        """Answer held-out examples."""
        examples = read_examples(self.run, VALIDATION, wanted.max_examples)
        prompts, cut = self.engine.encode([example.prompt_messages for example in examples])
        answers = self.engine.generate(
            self.weights, prompts, wanted.max_new_tokens, DIALOGUE, self.done.open(DIALOGUE)
        )
        lines = [
            DialogueLine(
                id=example.id,
                prompt=example.prompt,
                expected=example.response,
                answer=answer.text,
                tokens=answer.tokens,
                finish=answer.finish,
                **rouge_scores(example.response, answer.text),
            )
            for example, answer in zip(examples, answers, strict=True)
        ]
        self.run.put(predictions_key(self.name, DIALOGUE), format_predictions(lines))
        logs.get().info("dialogues answered", examples=len(lines), prompts_cut=cut)

    def side_by_side(self) -> None:
        """Answer the prompts that every model is shown."""
        shown = side_prompts(self.run)
        prompts, _ = self.engine.encode([prompt.messages for prompt in shown])
        limit = self.run.spec.evals.side_by_side.max_new_tokens
        answers = self.engine.generate(
            self.weights, prompts, limit, "side by side", self.done.open(SIDE_BY_SIDE)
        )
        lines = [
            SideLine(id=p.id, prompt=p.text, expected=p.expected, answer=answer.text)
            for p, answer in zip(shown, answers, strict=True)
        ]
        self.run.put(predictions_key(self.name, SIDE_BY_SIDE), format_predictions(lines))


def _scored(question: Question, letters: str, row: np.ndarray) -> ChoiceLine:
    by_letter = {letter: round(float(s), 6) for letter, s in zip(letters, row, strict=True)}
    return choice_line(question, letters[int(row.argmax())], log_probabilities=by_letter)


@dataclass(frozen=True)
class SidePrompt:
    """A prompt that every model answers, with the expected answer if there is one."""

    id: str
    messages: tuple[Message, ...]
    expected: str | None = None

    @property
    def text(self) -> str:
        """The last message of the user."""
        return self.messages[-1].content


def side_prompts(run: Run) -> list[SidePrompt]:
    """Held-out prompts first, then the spec's own."""
    wanted = run.spec.evals.side_by_side
    held_out = read_examples(run, VALIDATION, wanted.max_examples)
    return [
        SidePrompt(example.id, example.prompt_messages, example.response) for example in held_out
    ] + [
        SidePrompt(f"prompt-{number}", (Message("user", prompt),))
        for number, prompt in enumerate(wanted.prompts, 1)
    ]
