"""Loglikelihoods and generation for many prompts, in batches of few shapes over all devices.

The compiled programs take the weights as an argument, so the base model and the tuned model share
them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from job.chat.conversation import Conversation
from job.chat.thoughts import split_thoughts
from job.chat.tokenizer import OptionTokens
from job.evals.batching import (
    COMPILE_TOKENS,
    CPU_COMPILE_TOKENS,
    PackedPrompts,
    PaddedPrompts,
    PromptBatch,
    batch_by_length,
    batch_packed,
    round_length,
)
from job.model.generation import SamplerState, Sampling
from job.model.language_model import ForwardConfig, LanguageModel
from job.model.lora import Weights
from job.runtime.watchdog import progress


@dataclass(frozen=True)
class Generation:
    """One generated answer."""

    text: str
    """The answer without thoughts; empty if it was cut inside them."""
    tokens: int
    """Number of new tokens, without the stop token."""
    finish: Literal["stop", "length"]
    thoughts: str = ""


class BatchCache(Protocol):
    """Stored results of an evaluation's batches."""

    def get(self, batch: int) -> list[Any] | None:
        """Return the results for the prompts of a batch, or None."""

    def add(self, batch: int, results: list[Any]) -> None:
        """Store the results for the prompts of a batch: values that JSON represents exactly."""


class Engine:
    """Runs prompts through a model with the weights it is given."""

    def __init__(
        self,
        model: LanguageModel,
        per_device_batch_size: int,
        max_prompt_tokens: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare the engine; `check` is called before each batch and may raise to stop."""
        self._model = model
        self.batch_size = per_device_batch_size * model.devices
        """Maximum number of prompts in a batch."""
        self.max_prompt_tokens = max_prompt_tokens
        compile_tokens = CPU_COMPILE_TOKENS if model.platform == "cpu" else COMPILE_TOKENS
        self._compile_tokens = compile_tokens * model.devices
        self._check = check
        self._generate_programs: dict[Sampling | None, Callable[..., Any]] = {}

    def encode(self, prompts: Sequence[Conversation | str]) -> tuple[list[list[int]], int]:
        """Tokenize prompts, keeping the start token and the end of those that are too long.

        Returns:
            token ids, and the number of prompts that were truncated.
        """
        limit = self.max_prompt_tokens
        encoded = self._model.tokenizer.encode_prompts(prompts)
        start = self._model.tokenizer.start_id
        truncated = []
        for ids in encoded:
            first = [start] if len(ids) > limit and ids[0] == start else []
            truncated.append([*first, *ids[len(first) - limit :]])
        return truncated, sum(len(ids) > limit for ids in encoded)

    def _run_batches[B: PromptBatch](
        self,
        count: int,
        batches: Iterable[B],
        run_batch: Callable[[B], list[Any]],
        cache: BatchCache | None,
        label: str,
    ) -> list[Any]:
        """Return the cached or new result of each prompt, in order.

        The batches do not depend on what is cached, so results are the same after a restart.
        """
        results: dict[int, Any] = {}
        with progress(label, count) as advance:
            for number, batch in enumerate(batches):
                values = None if cache is None else cache.get(number)
                if values is None:
                    self._check()
                    values = run_batch(batch)
                    if cache is not None:
                        cache.add(number, values)
                results.update(zip(batch.indices, values, strict=True))
                advance(len(batch.indices))
        return [results[index] for index in range(count)]

    @cached_property
    def loglikelihood_program(self) -> Callable[..., Any]:
        """The jitted program that scores options after prompts.

        Its static arguments: `shared_length` is the number of tokens at the end of each prompt
        that belong to every option, whose log-probabilities are added; `max_length` is the
        length of the longest prompt, if known.
        """
        model = self._model

        def loglikelihood(
            weights: Weights,
            tokens: Any,
            segment_ids: Any,
            ends: Any,
            option_ids: Any,
            shared_length: int = 0,
            max_length: int | None = None,
        ) -> Any:
            groups, width = ends.shape
            positions = jnp.maximum(ends[:, :, None] - jnp.arange(shared_length, -1, -1), 0)
            flat = positions.reshape(groups, -1)
            states = model.hidden_states(
                weights,
                {"token_ids": tokens, "segment_ids": segment_ids, "positions": flat},
                ForwardConfig(model.can_pack, "none", max_length),
            )
            scores = jax.nn.log_softmax(model.logits(weights, states))
            scores = scores.reshape(groups, width, shared_length + 1, -1)
            shared_ids = jnp.take_along_axis(tokens.reshape(groups, -1), flat, axis=1)
            shared_ids = shared_ids.reshape(positions.shape)[:, :, 1:, None]
            shared = jnp.take_along_axis(scores[:, :, :-1], shared_ids, axis=3).sum(axis=2)
            return scores[:, :, -1, option_ids] + shared

        return jax.jit(
            loglikelihood,
            static_argnames=("shared_length", "max_length"),
            out_shardings=model.replicated,
        )

    def loglikelihood(
        self,
        weights: Weights,
        prompts: Sequence[list[int]],
        options: OptionTokens,
        label: str,
        cache: BatchCache | None = None,
    ) -> np.ndarray:
        """Return the log-probability of each option as the answer to each prompt.

        Args:
            weights: as `LanguageModel.weights`.
            prompts: token ids.
            options: token ids of the options, the same for all prompts.
            label: name of the work in progress messages.
            cache: results of batches that need not run again.

        Returns:
            float32 `[prompts, options]`.
        """
        option_ids = np.array(options.ids, np.int32)
        model = self._model

        def run_batch(batch: PackedPrompts) -> list[Any]:
            tokens, segment_ids, ends = model.shard_batch(
                (batch.tokens, batch.segment_ids, batch.ends)
            )
            scores = self.loglikelihood_program(
                weights,
                tokens,
                segment_ids,
                ends,
                option_ids,
                shared_length=len(options.prefix),
                max_length=max_length,
            )
            values: list[Any] = np.asarray(scores)[batch.end_indices].tolist()
            return values

        extended = [[*prompt, *options.prefix] for prompt in prompts]
        max_length = round_length(max(map(len, extended), default=0))
        batches = batch_packed(
            extended, self.batch_size, model.devices, self._compile_tokens, packing=model.can_pack
        )
        return np.array(
            self._run_batches(len(prompts), batches, run_batch, cache, label), np.float32
        )

    def generate_program(self, sampling: Sampling | None = None) -> Callable[..., Any]:
        """Return the jitted program that generates, greedily without `sampling`.

        Its argument `limit` is static; `state` is the random generator's, for sampling.
        """
        sampling = None if sampling is None else replace(sampling, seed=0)  # one for all seeds
        if sampling not in self._generate_programs:
            model = self._model
            sampler = None if sampling is None else sampling.sampler(model.vocabulary)

            def generate(
                weights: Weights, tokens: Any, lengths: Any, limit: int, state: Any = None
            ) -> Any:
                sampler_state = None if sampler is None else SamplerState(sampler, state)
                return model.generate(
                    weights, tokens, lengths, limit, model.tokenizer.stop_ids, sampler_state
                )

            self._generate_programs[sampling] = jax.jit(
                generate, static_argnames="limit", out_shardings=model.replicated
            )
        return self._generate_programs[sampling]

    def generate(
        self,
        weights: Weights,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        label: str,
        cache: BatchCache | None = None,
        sampling: Sampling | None = None,
    ) -> list[Generation]:
        """Generate an answer to each prompt until a stop token or `max_new_tokens`.

        Args:
            weights: as `LanguageModel.weights`.
            prompts: token ids.
            max_new_tokens: limit of each answer.
            label: name of the work in progress messages.
            cache: results of batches that need not run again.
            sampling: how to sample; greedy without it.
        """
        model = self._model

        def run_batch(batch: PaddedPrompts) -> list[Any]:
            tokens, lengths = model.shard_batch((batch.tokens, batch.lengths))
            state = None if sampling is None else sampling.state(batch.indices[0])
            program = self.generate_program(sampling)
            rows = program(weights, tokens, lengths, limit=max_new_tokens, state=state)
            rows = np.asarray(rows)[: len(batch.indices)]
            return [
                astuple(self._decode(row.tolist(), prompts[index]))
                for index, row in zip(batch.indices, rows, strict=True)
            ]

        batches = batch_by_length(
            prompts, self.batch_size, model.devices, model.tokenizer.pad_id, self._compile_tokens
        )
        values = self._run_batches(len(prompts), batches, run_batch, cache, label)
        return [Generation(*fields) for fields in values]

    def _decode(self, tokens: list[int], prompt: list[int]) -> Generation:
        """Decode an answer up to its first stop token."""
        tokenizer = self._model.tokenizer
        end = next((i for i, token in enumerate(tokens) if token in tokenizer.stop_ids), None)
        text, prompt_end = tokenizer.decode(tokens[:end]).strip(), tokenizer.decode(prompt[-16:])
        thoughts, answer = split_thoughts(text, prompt_end)
        if end is None:
            return Generation(answer or "", len(tokens), "length", thoughts)
        return Generation(answer or "", end, "stop", thoughts)
