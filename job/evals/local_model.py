"""Evaluation of a local model: prompts through the engine, answers to prediction lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from job.chat.conversation import Conversation
from job.chat.tokenizer import ChatTokenizer
from job.data.examples import Example
from job.data.packing import tokenize
from job.errors import UsageError
from job.evals.answer_parsing import parse_choice
from job.evals.engine import Engine, Generation
from job.evals.metrics import dialogue_line
from job.evals.prediction_cache import PredictionCaches
from job.evals.predictions import (
    DIALOGUE,
    LOSS,
    SIDE_BY_SIDE,
    ChoiceLine,
    DialogueLine,
    LossLine,
    SideLine,
    TextLine,
    choice_line,
)
from job.evals.questions import Question
from job.evals.tasks import (
    SideBySidePrompt,
    Task,
    TextTask,
    letter_context,
    question_prompts,
    text_lines,
)
from job.model.lora import Weights
from job.runtime import logs


@dataclass(frozen=True)
class LocalModel:
    """A model with certain weights, whose finished batches are cached."""

    engine: Engine
    tokenizer: ChatTokenizer
    weights: Weights
    caches: PredictionCaches
    max_truncated_share: float = 1.0
    """Share of an evaluation's prompts that may be truncated."""

    def _encode(
        self, name: str, prompts: Sequence[Conversation | str]
    ) -> tuple[list[list[int]], int]:
        """Return token ids, and the number of truncated prompts; see `check_truncated`."""
        encoded, truncated = self.engine.encode(prompts)
        self.check_truncated(name, truncated, len(prompts))
        return encoded, truncated

    def check_truncated(self, name: str, truncated: int, prompts: int) -> None:
        """Warn about truncated prompts of an evaluation.

        Raises:
            UsageError: there are too many.
        """
        if truncated > self.max_truncated_share * prompts:
            raise UsageError(
                f"evals: {truncated:,} of {prompts:,} prompts of '{name}' are longer than "
                f"evals.max_prompt_tokens ({self.engine.max_prompt_tokens:,}) and would lose their "
                f"beginning, more than evals.max_truncated_share ({self.max_truncated_share:g}); "
                "raise the first, or the second if they may"
            )
        if truncated:
            logs.get().warning("prompts truncated", eval=name, truncated=truncated, prompts=prompts)

    def answer_questions(self, task: Task) -> tuple[list[ChoiceLine], int]:
        """Return predictions for a task, and the number of truncated prompts."""
        entry, questions = task.entry, task.questions
        prompts, truncated = self._encode(entry.name, question_prompts(task))
        cache = self.caches.open(entry.name)
        if entry.scoring == "letters":
            letters = max((question.letters for question in questions), key=len)
            tokens = self.tokenizer.letter_tokens(letters, *letter_context(entry))
            scores = self.engine.loglikelihood(self.weights, prompts, tokens, entry.name, cache)
            lines = [_scored_line(q, row) for q, row in zip(questions, scores, strict=True)]
        else:
            answers = self.engine.generate(
                self.weights, prompts, entry.max_new_tokens, entry.name, cache
            )
            lines = [
                choice_line(q, parse_choice(a.text, q.options), **_generated(a), finish=a.finish)
                for q, a in zip(questions, answers, strict=True)
            ]
        return lines, truncated

    def answer_examples(
        self, examples: Sequence[Example], max_new_tokens: int
    ) -> tuple[list[DialogueLine], int]:
        """Return predictions for held-out examples, and the number of truncated prompts."""
        messages = [example.prompt_messages for example in examples]
        prompts, truncated = self._encode(DIALOGUE, messages)
        answers = self.engine.generate(
            self.weights, prompts, max_new_tokens, DIALOGUE, self.caches.open(DIALOGUE)
        )
        lines = [
            dialogue_line(example, **_generated(a), tokens=a.tokens, finish=a.finish)
            for example, a in zip(examples, answers, strict=True)
        ]
        return lines, truncated

    def answer_task(self, task: TextTask) -> tuple[list[TextLine], int]:
        """Return predictions for a task with free answers, and the number of truncated prompts."""
        entry = task.entry
        messages = [example.prompt_messages for example in task.examples]
        prompts, truncated = self._encode(entry.name, messages)
        answers = self.engine.generate(
            self.weights, prompts, entry.max_new_tokens, entry.name, self.caches.open(entry.name)
        )
        fields = [_generated(answer) | {"finish": answer.finish} for answer in answers]
        return text_lines(task, fields), truncated

    def measure_losses(self, examples: Sequence[Example], max_length: int) -> list[LossLine]:
        """Return the losses of the examples' responses, without those past `max_length` tokens."""
        rows = tokenize(examples, self.tokenizer, max_length, "response").examples
        scores = self.engine.score_tokens(
            self.weights, [(r.token_ids, r.loss_mask) for r in rows], "loss", self.caches.open(LOSS)
        )
        sums: dict[str, tuple[int, float]] = {}
        for row, score in zip(rows, scores, strict=True):
            tokens, nats = sums.get(row.id, (0, 0.0))
            sums[row.id] = tokens + score.tokens, nats - score.loglikelihood
        return [LossLine(id=i, tokens=n, nats=round(nats, 6)) for i, (n, nats) in sums.items()]

    def answer_side_by_side(
        self, prompts: Sequence[SideBySidePrompt], max_new_tokens: int
    ) -> tuple[list[SideLine], int]:
        """Return answers to prompts to read, and how many of them were truncated, however many."""
        encoded, truncated = self.engine.encode([prompt.messages for prompt in prompts])
        cache = self.caches.open(SIDE_BY_SIDE)
        answers = self.engine.generate(self.weights, encoded, max_new_tokens, "side by side", cache)
        lines = [
            SideLine(id=p.id, prompt=p.text, expected=p.expected, **_generated(answer))
            for p, answer in zip(prompts, answers, strict=True)
        ]
        return lines, truncated


def _generated(answer: Generation) -> dict[str, Any]:
    return {"answer": answer.text, "thoughts": answer.thoughts}


def _scored_line(question: Question, scores: np.ndarray) -> ChoiceLine:
    """Return the line of the letter with the highest loglikelihood, of those the question has."""
    letters = question.letters
    scores = scores[: len(letters)]
    by_letter = {letter: round(float(s), 6) for letter, s in zip(letters, scores, strict=True)}
    return choice_line(question, letters[int(scores.argmax())], log_probabilities=by_letter)
