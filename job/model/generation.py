"""Batched decoding over KerasHub's key-value cache.

Prompts are left-padded, so that all of them end at the same index and each loop iteration
generates one token per row. Tokens see no key before the start of their own prompt, and positions
need no shift, since rotary embeddings are relative. KerasHub's own loop begins at the end of the
shortest prompt and continues to the end of the buffer; this one runs one iteration per new token,
and its prefill does not cover the room for them.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras_hub import samplers

from job.model.patching import Patch, patched


def left_pad(token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """Move prompts to the end of their rows.

    Args:
        token_ids: int32 `[batch, length]`, prompts at the beginning.
        lengths: int32 `[batch]`, tokens of each prompt.
    """
    size = token_ids.shape[1]
    sources = (jnp.arange(size) - (size - lengths)[:, None]) % size
    return jnp.take_along_axis(token_ids, sources, axis=1)


def empty_cache(task: Any, batch: int, length: int) -> Any:
    """Make a KerasHub task's key-value cache with room for `length` tokens per row."""

    def return_cache(token_ids: Any, cache: Any, *_: Any, **__: Any) -> tuple[None, None, Any]:
        return None, None, cache

    names = inspect.signature(task._build_cache).parameters
    arguments = dict.fromkeys(names) | {"token_ids": jnp.zeros((batch, length), jnp.int32)}
    with patched([Patch(task, "call_with_cache", return_cache)]):
        return task._build_cache(**arguments)[1]


def greedy(logits: jax.Array, _step: Any) -> jax.Array:
    """Return the most likely token of each row, int32 `[batch]`."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def decode(
    prefilled: tuple[jax.Array, Any],
    next_logits: Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    choose: Callable[[jax.Array, Any], jax.Array] = greedy,
) -> jax.Array:
    """Decode until every row has a stop token; traceable.

    Args:
        prefilled: logits after the prompts, float32 `[batch, vocabulary]`, and the cache.
        next_logits: maps (tokens int32 `[batch]`, cache, step from 0) to (logits, cache).
        max_new_tokens: the most new tokens per row.
        stop_ids: token ids that end a row.
        choose: maps (logits, step) to the next token of each row, int32 `[batch]`.

    Returns:
        int32 `[batch, max_new_tokens]`; what follows a row's first stop token is meaningless.
    """
    logits, cache = prefilled
    stops = jnp.array(stop_ids, jnp.int32)
    tokens = choose(logits, 0)
    output = jnp.zeros((len(tokens), max_new_tokens), jnp.int32).at[:, 0].set(tokens)

    def unfinished(state: Any) -> Any:
        step, _, done, _, _ = state
        return (step < max_new_tokens - 1) & ~done.all()

    def step_once(state: Any) -> Any:
        step, tokens, done, output, cache = state
        logits, cache = next_logits(tokens, cache, step)
        tokens = choose(logits, step + 1)
        output = jax.lax.dynamic_update_slice(output, tokens[:, None], (0, step + 1))
        return step + 1, tokens, done | jnp.isin(tokens, stops), output, cache

    state = (jnp.int32(0), tokens, jnp.isin(tokens, stops), output, cache)
    final: tuple[Any, Any, Any, jax.Array, Any] = jax.lax.while_loop(unfinished, step_once, state)
    return final[3]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings."""

    temperature: float = 1.0
    """Above 0; logits are divided by it."""
    seed: int = 0
    """The same seed gives the same text for the same prompt, on the same machine."""

    def sampler(self) -> Any:
        """Return KerasHub's sampler, one for all seeds; call outside of traced functions."""
        return _sampler(self.temperature)

    def state(self, batch_index: int) -> np.ndarray:
        """Return the random state at the start of a batch, uint32 `[2]`."""
        return np.random.SeedSequence([self.seed, batch_index]).generate_state(2)


@functools.cache
def _sampler(temperature: float) -> Any:
    return samplers.RandomSampler(temperature=temperature)


@dataclass(frozen=True)
class SamplerState:
    """A KerasHub sampler with its random state as an argument of a traced function."""

    sampler: Any
    state: jax.Array
    """uint32 `[2]`: a seed, and the number of draws."""

    def mapping(self, draws: Any = 0) -> list[tuple[Any, jax.Array]]:
        """Map the sampler's variable to its value after some draws, for a `StatelessScope`."""
        (variable,) = self.sampler.variables
        advance = jnp.array([0, 1], jnp.uint32) * jnp.asarray(draws, jnp.uint32)
        return [(variable, jnp.asarray(self.state, jnp.uint32) + advance)]

    def choose(self, logits: jax.Array, step: Any) -> jax.Array:
        """Sample the next token of each row, int32 `[batch]`, at a step of the decoding loop."""
        with keras.StatelessScope(state_mapping=self.mapping(step)):
            tokens = self.sampler.get_next_token(self.sampler.compute_probabilities(logits))
        return jnp.asarray(tokens, jnp.int32)
