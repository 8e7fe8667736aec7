"""Loglikelihoods and generation for many prompts, in batches of few shapes over all devices.

The compiled programs take the weights as an argument, so the base model and the tuned model share
them.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

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
    batch_by_length,
    batch_packed,
    round_length,
)
from job.evals.prediction_cache import PredictionCache
from job.evals.predictions import Reply
from job.model.generation import SamplerState, Sampling
from job.model.language_model import ForwardConfig, LanguageModel
from job.model.lora import Weights
from job.runtime.watchdog import progress
from job.train.loss import chunk_length


class TokenScore(NamedTuple):
    """How likely a model finds given tokens."""

    loglikelihood: float
    """Sum of the tokens' log-probabilities."""
    tokens: int
    is_greedy: bool
    """Whether each is the likeliest token in its place."""


class Engine:
    """Runs the prompts of evaluations, as token ids, through a model with the weights it is given.

    `name` is the evaluation. The batches that a cache has for it need not run again.
    """

    def __init__(
        self,
        model: LanguageModel,
        per_device_batch_size: int,
        max_prompt_tokens: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare the engine; `check` is called before each batch and may raise to stop."""
        self._model = model
        self.tokenizer = model.tokenizer
        self.batch_size = per_device_batch_size * model.devices
        """Maximum number of prompts in a batch."""
        self.max_prompt_tokens = max_prompt_tokens
        compile_tokens = CPU_COMPILE_TOKENS if model.platform == "cpu" else COMPILE_TOKENS
        self._compile_tokens = compile_tokens * model.devices
        self._check = check

    def encode(self, prompts: Sequence[Conversation | str]) -> tuple[list[list[int]], int]:
        """Tokenize prompts, keeping the start token and the end of those that are too long.

        Returns:
            token ids, and the number of prompts that were truncated.
        """
        limit = self.max_prompt_tokens
        encoded = self.tokenizer.encode_prompts(prompts)
        start = self.tokenizer.start_id
        truncated = []
        for ids in encoded:
            first = [start] if len(ids) > limit and ids[0] == start else []
            truncated.append([*first, *ids[len(first) - limit :]])
        return truncated, sum(len(ids) > limit for ids in encoded)

    def _run_batches[B: (PaddedPrompts, PackedPrompts)](
        self,
        count: int,
        batches: Iterable[B],
        run_batch: Callable[[B], list[Any]],
        name: str,
        cache: PredictionCache | None,
    ) -> list[Any]:
        """Return the cached or new result of each prompt, in order.

        The batches do not depend on what is cached, so results are the same after a restart.
        """
        results: dict[int, Any] = {}
        with progress(name, count) as advance:
            for number, batch in enumerate(batches):
                values = None if cache is None else cache.get(name, number)
                if values is None:
                    self._check()
                    values = run_batch(batch)
                    if cache is not None:
                        cache.add(name, number, values)
                results.update(zip(batch.indices, values, strict=True))
                advance(len(batch.indices))
        return [results[index] for index in range(count)]

    def _pack(self, rows: Sequence[list[int]]) -> tuple[list[PackedPrompts], int]:
        """Return packed batches of token ids, and the length of the longest row, rounded."""
        model = self._model
        batches = batch_packed(
            rows, self.batch_size, model.devices, self._compile_tokens, packing=model.can_pack
        )
        return list(batches), round_length(max(map(len, rows), default=0))

    def _states(
        self, weights: Weights, tokens: Any, segment_ids: Any, positions: Any, most: int | None
    ) -> Any:
        """Return hidden states of packed rows at positions, if `most` is the longest prompt."""
        inputs = {"token_ids": tokens, "segment_ids": segment_ids, "positions": positions}
        config = ForwardConfig(self._model.can_pack, "none", most)
        return self._model.hidden_states(weights, inputs, config)

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
            states = self._states(weights, tokens, segment_ids, flat, max_length)
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
        name: str,
        cache: PredictionCache | None = None,
    ) -> np.ndarray:
        """Return the log-probability of each option as the answer to each prompt.

        It is float32, `[prompts, options]`; the options are the same for all prompts.
        """
        option_ids = np.array(options.ids, np.int32)

        def run_batch(batch: PackedPrompts) -> list[Any]:
            arrays = self._model.shard_batch((batch.tokens, batch.segment_ids, batch.ends))
            lengths = {"shared_length": len(options.prefix), "max_length": max_length}
            scores = self.loglikelihood_program(weights, *arrays, option_ids, **lengths)
            values: list[Any] = np.asarray(scores)[batch.end_indices].tolist()
            return values

        batches, max_length = self._pack([[*prompt, *options.prefix] for prompt in prompts])
        values = self._run_batches(len(prompts), batches, run_batch, name, cache)
        return np.array(values, np.float32)

    @cached_property
    def score_program(self) -> Callable[..., Any]:
        """The jitted program that scores the tokens after `positions`, `[devices, chunks, n]`.

        It returns their log-probabilities and whether each is the likeliest token, in arrays
        `[chunks, devices, n]`. Logits are computed for one chunk at a time.
        """
        model = self._model

        def score(
            weights: Weights,
            tokens: Any,
            segment_ids: Any,
            positions: Any,
            max_length: int | None = None,
        ) -> Any:
            flat = positions.reshape(len(positions), -1)
            states = self._states(weights, tokens, segment_ids, flat, max_length)
            targets = jnp.take_along_axis(tokens.reshape(len(flat), -1), flat + 1, axis=1)

            def split(array: Any) -> Any:
                return jnp.moveaxis(array.reshape(*positions.shape, *array.shape[2:]), 1, 0)

            def score_chunk(chunk: tuple[Any, Any]) -> tuple[Any, Any]:
                states, targets = chunk
                logits = model.logits(weights, states)
                chosen = jnp.take_along_axis(logits, targets[..., None], axis=2)[..., 0]
                return chosen - jax.nn.logsumexp(logits, axis=2), logits.argmax(axis=2) == targets

            return jax.lax.map(score_chunk, (split(states), split(targets)))

        return jax.jit(score, static_argnames="max_length", out_shardings=model.replicated)

    def score_tokens(
        self,
        weights: Weights,
        rows: Sequence[tuple[list[int], list[bool]]],
        name: str,
        cache: PredictionCache | None = None,
    ) -> list[TokenScore]:
        """Score the marked tokens of each row, given all tokens before them.

        Rows are token ids and marks, `[tokens]` both; the first token has no mark.
        """
        model = self._model
        # Positions before marked tokens, counted from the last token of the row.
        before = [np.flatnonzero(marks) - len(marks) for _, marks in rows]
        batches, max_length = self._pack([token_ids for token_ids, _ in rows])
        most = 1
        for batch in batches:
            counts = [len(before[index]) for index in batch.indices]
            most = max(most, int(np.bincount(batch.end_indices[0], counts).max()))
        width = chunk_length(1, most, model.vocabulary, jnp.float32)
        shape = (model.devices, -(-most // width), width)

        def run_batch(batch: PackedPrompts) -> list[Any]:
            positions = np.zeros((shape[0], shape[1] * width), np.int32)
            places, filled = [], [0] * model.devices
            ends = batch.ends[batch.end_indices]
            for index, device, end in zip(batch.indices, batch.end_indices[0], ends, strict=True):
                place = slice(filled[device], filled[device] + len(before[index]))
                positions[device, place] = end + before[index]
                filled[device] = place.stop
                places.append((device, place))
            arrays = batch.tokens, batch.segment_ids, positions.reshape(shape)
            results = self.score_program(weights, *model.shard_batch(arrays), max_length=max_length)
            scores, best = (
                np.moveaxis(np.asarray(r), 0, 1).reshape(len(positions), -1) for r in results
            )
            return [
                (float(scores[at].sum(dtype=np.float64)), len(scores[at]), bool(best[at].all()))
                for at in places
            ]

        values = self._run_batches(len(rows), batches, run_batch, name, cache)
        return [TokenScore(*fields) for fields in values]

    @cached_property
    def generate_program(self) -> Callable[..., Any]:
        """The jitted program that generates, greedily without a `sampler`.

        `limit` and `sampler` are static; `state` is that of the sampler.
        """
        model = self._model

        def generate(
            weights: Weights, tokens: Any, lengths: Any, limit: int, sampler: Any = None,
            state: Any = None,
        ) -> Any:  # fmt: skip
            drawn = None if sampler is None else SamplerState(sampler, state)
            stop_ids = model.tokenizer.stop_ids
            return model.generate(weights, tokens, lengths, limit, stop_ids, drawn)

        static = ("limit", "sampler")
        return jax.jit(generate, static_argnames=static, out_shardings=model.replicated)

    def generate(
        self,
        weights: Weights,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        name: str,
        cache: PredictionCache | None = None,
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """Generate after each prompt, up to and with a stop token, or `max_new_tokens`.

        Decoding is greedy without `sampling`. `reply` gives the text.
        """
        model = self._model
        stop_ids = model.tokenizer.stop_ids

        def run_batch(batch: PaddedPrompts) -> list[Any]:
            tokens, lengths = model.shard_batch((batch.tokens, batch.lengths))
            drawn: dict[str, Any] = {}
            if sampling is not None:
                drawn = {"sampler": sampling.sampler(), "state": sampling.state(batch.indices[0])}
            rows = self.generate_program(weights, tokens, lengths, limit=max_new_tokens, **drawn)
            rows = np.asarray(rows)[: len(batch.indices)]
            stopped = np.isin(rows, stop_ids)
            ends = np.where(stopped.any(axis=1), stopped.argmax(axis=1) + 1, rows.shape[1])
            return [row[:end].tolist() for row, end in zip(rows, ends, strict=True)]

        batches = batch_by_length(
            prompts, self.batch_size, model.devices, model.tokenizer.pad_id, self._compile_tokens
        )
        return self._run_batches(len(prompts), batches, run_batch, name, cache)

    def reply(self, tokens: list[int], prompt: list[int]) -> Reply:
        """Return the answer in generated tokens, which may end in a stop token."""
        tokenizer = self.tokenizer
        is_complete = bool(tokens) and tokens[-1] in tokenizer.stop_ids
        new = tokens[:-1] if is_complete else tokens
        text, prompt_end = tokenizer.decode(new).strip(), tokenizer.decode(prompt[-16:])
        thoughts, answer = split_thoughts(text, prompt_end)
        finish = "stop" if is_complete else "length"
        return Reply(answer or "", thoughts, finish=finish, completion_tokens=len(new))
