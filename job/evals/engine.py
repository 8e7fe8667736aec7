"""Many prompts through one model: in batches of few shapes, split over the devices.

Prompts are sorted by length and padded to a rung of a short ladder of lengths, so that only
a few programs are compiled, and the same ones for the baseline and the tuned model: the
weights are an argument.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from job.model.language_model import LanguageModel
from job.model.lora import Weights
from job.model.sampling import Sampling
from job.progress import progress

LADDER = (64, 128, 192, 256, 384, 512, 768, 1024)


def rung(length: int) -> int:
    """The smallest padded length of the ladder that holds `length`; multiples of 512 above it."""
    for step in LADDER:
        if length <= step:
            return step
    return -(-length // 512) * 512


@dataclass(frozen=True)
class Generated:
    """One generated answer."""

    text: str
    tokens: int
    """New tokens, the one that ended the answer not counted."""
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class _Batch:
    numbers: list[int]
    """The prompts in it; rows beyond them repeat the last."""
    tokens: np.ndarray
    lengths: np.ndarray


class Engine:
    """Scores and generates with a model's structure and the weights it is given."""

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        max_prompt_tokens: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Args: batch_size: prompts a device holds at once; check: called before each batch."""
        self._model = model
        self._rows = batch_size * model.devices
        self._limit = max_prompt_tokens
        self._check = check
        self._drawn: dict[Sampling, Callable[..., Any]] = {}

    def encode(self, prompts: Sequence[str | Sequence[str]]) -> tuple[list[list[int]], int]:
        """Tokens of wrapped prompts, and how many lost their beginning to the limit."""
        encoded = self._model.codec.encode_prompts(prompts)
        kept = [
            tokens
            if len(tokens) <= self._limit
            else tokens[:1] + tokens[len(tokens) - self._limit + 1 :]
            for tokens in encoded
        ]
        return kept, sum(len(tokens) > self._limit for tokens in encoded)

    def _batches(self, prompts: Sequence[list[int]]) -> Iterator[_Batch]:
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        for start in range(0, len(order), self._rows):
            numbers = order[start : start + self._rows]
            filled = numbers + [numbers[-1]] * (self._rows - len(numbers))
            lengths = np.array([len(prompts[i]) for i in filled], np.int32)
            tokens = np.full(
                (self._rows, rung(int(lengths.max()))), self._model.codec.pad_id, np.int32
            )
            for row, number in enumerate(filled):
                tokens[row, : lengths[row]] = prompts[number]
            self._check()
            yield _Batch(numbers, tokens, lengths)

    @cached_property
    def scorer(self) -> Callable[..., Any]:
        """The program that scores letters after prompts; compiled for each shape it is given."""
        model = self._model

        def score(weights: Weights, tokens: Any, lengths: Any, letters: Any) -> Any:
            mask = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
            hidden = model.plain_hidden(weights, tokens, mask)
            last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
            return jax.nn.log_softmax(model.logits(weights, last))[:, letters]

        return jax.jit(score, out_shardings=model.whole)

    def letter_log_probabilities(
        self, weights: Weights, prompts: Sequence[list[int]], letters: str, label: str
    ) -> np.ndarray:
        """Log-probability of each letter as the next token: float32 `[prompts, letters]`."""
        ids = np.array(self._model.codec.letter_ids(letters), np.int32)
        found = np.zeros((len(prompts), len(letters)), np.float32)
        with progress(label, len(prompts)) as advance:
            for batch in self._batches(prompts):
                tokens, lengths = self._model.split_batch((batch.tokens, batch.lengths))
                scores = np.asarray(self.scorer(weights, tokens, lengths, ids))
                found[batch.numbers] = scores[: len(batch.numbers)]
                advance(len(batch.numbers))
        return found

    @cached_property
    def generator(self) -> Callable[..., Any]:
        """The program that fills rows after their prompts; compiled for each shape likewise."""
        model = self._model

        def generate(weights: Weights, tokens: Any, lengths: Any) -> Any:
            mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
            return model.generate(weights, tokens, mask, model.codec.stop_ids)

        return jax.jit(generate, out_shardings=model.whole)

    def _drawing(self, sampling: Sampling) -> Callable[..., Any]:
        """The same program for sampled decoding; the state of the generator is an argument."""
        sampling = replace(sampling, seed=0)  # one program for all seeds
        if sampling not in self._drawn:
            self._drawn[sampling] = self._sampled(sampling)
        return self._drawn[sampling]

    def _sampled(self, sampling: Sampling) -> Callable[..., Any]:
        model = self._model
        sampler = sampling.sampler(model.vocabulary)

        def generate(weights: Weights, tokens: Any, lengths: Any, state: Any) -> Any:
            mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
            return model.generate(weights, tokens, mask, model.codec.stop_ids, (sampler, state))

        return jax.jit(generate, out_shardings=model.whole)

    def _decode(self, number: int, sampling: Sampling | None, *arguments: Any) -> np.ndarray:
        """The rows of batch `number` with their answers."""
        if sampling is None:
            return np.asarray(self.generator(*arguments))
        return np.asarray(self._drawing(sampling)(*arguments, sampling.state(number)))

    def generate(
        self,
        weights: Weights,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        label: str,
        sampling: Sampling | None = None,
    ) -> list[Generated]:
        """Answers of at most `max_new_tokens` tokens, in the order of the prompts.

        Greedy without `sampling`.
        """
        found: dict[int, Generated] = {}
        with progress(label, len(prompts)) as advance:
            for place, batch in enumerate(self._batches(prompts)):
                padding = ((0, 0), (0, max_new_tokens))
                room = np.pad(batch.tokens, padding, constant_values=self._model.codec.pad_id)
                tokens, lengths = self._model.split_batch((room, batch.lengths))
                rows = self._decode(place, sampling, weights, tokens, lengths)
                for row, number in enumerate(batch.numbers):
                    start = int(batch.lengths[row])
                    found[number] = self._cut(rows[row, start : start + max_new_tokens].tolist())
                advance(len(batch.numbers))
        return [found[number] for number in range(len(prompts))]

    def _cut(self, tokens: list[int]) -> Generated:
        """The answer up to its first stop token."""
        stops = [place for place, token in enumerate(tokens) if token in self._model.codec.stop_ids]
        kept = tokens[: stops[0]] if stops else tokens
        text = self._model.codec.decode(kept).strip()
        return Generated(text, len(kept), "stop" if stops else "length")
