"""Evaluation of a local model: prompts through the engine."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from job.chat.conversation import Conversation
from job.data.examples import Example
from job.data.packing import tokenize
from job.errors import UsageError
from job.evals.engine import Engine
from job.evals.prediction_cache import PredictionCache
from job.evals.predictions import (
    LOSS,
    SIDE_BY_SIDE,
    ChoiceLine,
    LossLine,
    Reply,
    choice_line,
)
from job.evals.questions import Question
from job.evals.tasks import Task, choice_lines, letter_context, question_prompts
from job.model.lora import Weights
from job.runtime import logs


@dataclass(frozen=True)
class LocalModel:
    """A model with certain weights, whose finished batches are cached."""

    engine: Engine
    weights: Weights
    cache: PredictionCache
    max_truncated_share: float = 1.0
    """Share of an evaluation's prompts that may be truncated."""

    def _encode(
        self, name: str, prompts: Sequence[Conversation | str]
    ) -> tuple[list[list[int]], int]:
        """Return token ids, and the number of truncated prompts; see `check_truncated`."""
        encoded, truncated = self.engine.encode(prompts)
        if name != SIDE_BY_SIDE:  # whose answers are only read
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

    def generate(
        self, name: str, prompts: Sequence[Conversation | str], max_new_tokens: int
    ) -> tuple[list[Reply], int]:
        """Answer the prompts of an evaluation; return the number of truncated ones too."""
        encoded, truncated = self._encode(name, prompts)
        rows = self.engine.generate(self.weights, encoded, max_new_tokens, name, self.cache)
        return list(map(self.engine.reply, rows, encoded)), truncated

    def answer(
        self, name: str, examples: Sequence[Example], max_new_tokens: int
    ) -> tuple[list[Reply], int]:
        """Answer the prompts of examples; see `generate`."""
        prompts = [example.prompt_messages for example in examples]
        return self.generate(name, prompts, max_new_tokens)

    def answer_questions(self, task: Task) -> tuple[list[ChoiceLine], int]:
        """Return predictions for a task, and the number of truncated prompts."""
        entry, questions, prompts = task.entry, task.questions, question_prompts(task)
        if entry.scoring == "generate":
            replies, truncated = self.generate(entry.name, prompts, entry.max_new_tokens)
            return choice_lines(task, replies), truncated
        encoded, truncated = self._encode(entry.name, prompts)
        letters = max((question.letters for question in questions), key=len)
        tokens = self.engine.tokenizer.letter_tokens(letters, *letter_context(entry))
        scores = self.engine.loglikelihood(self.weights, encoded, tokens, entry.name, self.cache)
        lines = [_scored_line(q, row) for q, row in zip(questions, scores, strict=True)]
        return lines, truncated

    def measure_losses(self, examples: Sequence[Example], max_length: int) -> list[LossLine]:
        """Return the losses of the examples' responses, without those past `max_length` tokens."""
        rows = tokenize(examples, self.engine.tokenizer, max_length, "response").examples
        marked = [(row.token_ids, row.loss_mask) for row in rows]
        scores = self.engine.score_tokens(self.weights, marked, LOSS, self.cache)
        sums: dict[str, tuple[int, float]] = {}
        for row, score in zip(rows, scores, strict=True):
            tokens, nats = sums.get(row.id, (0, 0.0))
            sums[row.id] = tokens + score.tokens, nats - score.loglikelihood
        return [LossLine(id=i, tokens=n, nats=round(nats, 6)) for i, (n, nats) in sums.items()]


def _scored_line(question: Question, scores: np.ndarray) -> ChoiceLine:
    """Return the line of the letter with the highest loglikelihood, of those the question has."""
    letters = question.letters
    scores = scores[: len(letters)]
    by_letter = {letter: round(float(s), 6) for letter, s in zip(letters, scores, strict=True)}
    return choice_line(question, letters[int(scores.argmax())], log_probabilities=by_letter)
