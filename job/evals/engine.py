"""Many prompts through one model: in batches of few shapes, split over the devices.

The same programs serve the baseline and the tuned model: the weights are an argument.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from job.chat.tokenizer import OptionTokens
from job.evals.batching import (
    COMPILE_TOKENS,
    CPU_COMPILE_TOKENS,
    PackedPrompts,
    PaddedPrompts,
    PromptBatch,
    batch_by_length,
    batch_packed,
    rounded,
)
from job.model.generation import SamplerState, Sampling
from job.model.language_model import LanguageModel
from job.model.lora import Weights
from job.runtime.watchdog import progress


@dataclass(frozen=True)
class Generation:
    """One generated answer."""

    text: str
    tokens: int
    """New tokens, the one that ended the answer not counted."""
    finish: Literal["stop", "length"]


class BatchCache(Protocol):
    """What is known of an evaluation's batches already, and where more is added."""

    def get(self, batch: int) -> list[Any] | None:
        """What was found for the prompts of a batch, or None."""

    def add(self, batch: int, found: list[Any]) -> None:
        """Keep what was found for the prompts of a batch: values that JSON holds exactly."""


class NoCache:
    """An evaluation that begins anew each time."""

    def get(self, batch: int) -> list[Any] | None:
        """Nothing is known."""
        return None

    def add(self, batch: int, found: list[Any]) -> None:
        """Nothing is kept."""


NO_CACHE = NoCache()


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
        self.rows = batch_size * model.devices
        """Prompts of a batch, at most."""
        self._limit = max_prompt_tokens
        each = CPU_COMPILE_TOKENS if model.platform == "cpu" else COMPILE_TOKENS
        self._compile_tokens = each * model.devices
        self._check = check
        self._drawing: dict[Sampling, Callable[..., Any]] = {}

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

    def _answers[B: PromptBatch](
        self,
        count: int,
        batches: Iterable[B],
        ask: Callable[[B], list[Any]],
        kept: BatchCache,
        label: str,
    ) -> list[Any]:
        """What is known or found of each prompt. A batch is the same whatever was kept."""
        answers: dict[int, Any] = {}
        with progress(label, count) as advance:
            for number, batch in enumerate(batches):
                found = kept.get(number)
                if found is None:
                    self._check()
                    found = ask(batch)
                    kept.add(number, found)
                answers.update(zip(batch.prompts, found, strict=True))
                advance(len(batch.prompts))
        return [answers[number] for number in range(count)]

    @cached_property
    def scorer(self) -> Callable[..., Any]:
        """The program that scores letters after prompts; compiled for each shape it is given.

        `shared` says how many tokens at the end of each prompt are part of every answer: their
        log-probabilities are added. `reach` is the most tokens of a prompt, if known.
        """
        model = self._model

        def score(
            weights: Weights,
            tokens: Any,
            segment_ids: Any,
            ends: Any,
            letters: Any,
            shared: int = 0,
            reach: int | None = None,
        ) -> Any:
            groups, width = ends.shape
            places = jnp.maximum(ends[:, :, None] - jnp.arange(shared, -1, -1), 0)
            flat = places.reshape(groups, -1)
            states = model.states_at(weights, tokens, segment_ids, flat, reach)
            scores = jax.nn.log_softmax(model.logits(weights, states))
            scores = scores.reshape(groups, width, shared + 1, -1)
            said = jnp.take_along_axis(tokens.reshape(groups, -1), flat, axis=1)
            said = said.reshape(places.shape)[:, :, 1:, None]
            before = jnp.take_along_axis(scores[:, :, :-1], said, axis=3).sum(axis=2)
            return scores[:, :, -1, letters] + before

        return jax.jit(score, static_argnames=("shared", "reach"), out_shardings=model.replicated)

    def loglikelihood(
        self,
        weights: Weights,
        prompts: Sequence[list[int]],
        letters: OptionTokens,
        label: str,
        kept: BatchCache = NO_CACHE,
    ) -> np.ndarray:
        """Log-probability of each letter as the answer to each prompt.

        Returns:
            float32 `[prompts, letters]`.
        """
        ids = np.array(letters.ids, np.int32)
        model = self._model

        def ask(batch: PackedPrompts) -> list[Any]:
            tokens, segment_ids, ends = model.shard_batch(
                (batch.tokens, batch.segment_ids, batch.ends)
            )
            scores = self.scorer(
                weights, tokens, segment_ids, ends, ids, shared=len(letters.shared), reach=reach
            )
            found: list[Any] = np.asarray(scores)[batch.places].tolist()
            return found

        longer = [[*prompt, *letters.shared] for prompt in prompts]
        reach = rounded(max(map(len, longer), default=0))
        batches = batch_packed(
            longer, self.rows, model.devices, self._compile_tokens, packing=model.can_pack
        )
        found = self._answers(len(prompts), batches, ask, kept, label)
        return np.array(found, np.float32)

    @cached_property
    def generator(self) -> Callable[..., Any]:
        """The program that answers prompts; compiled for each shape likewise."""
        model = self._model

        def generate(weights: Weights, tokens: Any, lengths: Any, limit: int) -> Any:
            return model.answers(weights, tokens, lengths, limit, model.codec.stop_ids)

        return jax.jit(generate, static_argnames="limit", out_shardings=model.replicated)

    def drawer(self, sampling: Sampling) -> Callable[..., Any]:
        """The same for answers that are drawn; the state of the generator is an argument too."""
        sampling = replace(sampling, seed=0)  # one program for all seeds
        if sampling not in self._drawing:
            model = self._model
            sampler = sampling.sampler(model.vocabulary)

            def generate(
                weights: Weights, tokens: Any, lengths: Any, state: Any, limit: int
            ) -> Any:
                drawn = SamplerState(sampler, state)
                return model.answers(weights, tokens, lengths, limit, model.codec.stop_ids, drawn)

            self._drawing[sampling] = jax.jit(
                generate, static_argnames="limit", out_shardings=model.replicated
            )
        return self._drawing[sampling]

    def generate(
        self,
        weights: Weights,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        label: str,
        kept: BatchCache = NO_CACHE,
        sampling: Sampling | None = None,
    ) -> list[Generation]:
        """Answers of at most `max_new_tokens` tokens, in the order of the prompts.

        Greedy without `sampling`.
        """

        def ask(batch: PaddedPrompts) -> list[Any]:
            tokens, lengths = self._model.shard_batch((batch.tokens, batch.lengths))
            if sampling is None:
                rows = self.generator(weights, tokens, lengths, limit=max_new_tokens)
            else:
                state = sampling.state(batch.prompts[0])
                program = self.drawer(sampling)
                rows = program(weights, tokens, lengths, state, limit=max_new_tokens)
            rows = np.asarray(rows)
            return [astuple(self._cut(row.tolist())) for row in rows[: len(batch.prompts)]]

        model = self._model
        batches = batch_by_length(
            prompts, self.rows, model.devices, model.codec.pad_id, self._compile_tokens
        )
        found = self._answers(len(prompts), batches, ask, kept, label)
        return [Generation(*fields) for fields in found]

    def _cut(self, tokens: list[int]) -> Generation:
        """The answer up to its first stop token."""
        stops = [place for place, token in enumerate(tokens) if token in self._model.codec.stop_ids]
        kept = tokens[: stops[0]] if stops else tokens
        text = self._model.codec.decode(kept).strip()
        return Generation(text, len(kept), "stop" if stops else "length")
