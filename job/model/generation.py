"""Answers to many prompts at once: each prompt ends at the same place, so that one turn of
the loop is one new token of every row.

Prompts stand right-aligned, and tokens see no key before the start of their own; positions need
no shift where they are rotary, since those are relative. KerasHub's own loop begins at the end of
the shortest prompt and runs to the end of the buffer; this one takes as many turns as there are
new tokens, and reads prompts without the room for answers.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras_hub import samplers

from job.model.attention import mask_makers


def left_padded(token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """Prompts moved to the end of their rows.

    Args:
        token_ids: int32 `[batch, length]`, prompts at the beginning.
        lengths: int32 `[batch]`, tokens of each.
    """
    size = token_ids.shape[1]
    places = (jnp.arange(size) - (size - lengths)[:, None]) % size
    return jnp.take_along_axis(token_ids, places, axis=1)


@contextlib.contextmanager
def seen_from(backbone: Any, starts: jax.Array) -> Iterator[None]:
    """Within this block no token sees a key before the start of its row, int32 `[batch]`."""
    patched = list(mask_makers(backbone))
    for layer, name in patched:
        # Straight into the instance's dictionary: Keras tracks ordinary attributes.
        layer.__dict__[name] = _from(getattr(layer, name), starts)
    try:
        yield
    finally:
        for layer, name in patched:
            del layer.__dict__[name]


def _from(make_mask: Callable[..., Any], starts: jax.Array) -> Callable[..., Any]:
    def masked(*args: Any, **kwargs: Any) -> Any:
        mask = jnp.asarray(make_mask(*args, **kwargs), bool)
        return mask & (jnp.arange(mask.shape[-1]) >= starts[:, None, None])

    return masked


def empty_cache(task: Any, batch: int, length: int) -> Any:
    """A KerasHub task's cache of keys and values with room for `length` tokens a row."""

    def untouched(token_ids: Any, cache: Any, *_: Any, **__: Any) -> tuple[None, None, Any]:
        return None, None, cache

    names = inspect.signature(task._build_cache).parameters
    given = dict.fromkeys(names) | {"token_ids": jnp.zeros((batch, length), jnp.int32)}
    task.__dict__["call_with_cache"] = untouched
    try:
        return task._build_cache(**given)[1]
    finally:
        del task.__dict__["call_with_cache"]


def prefill(task: Any, token_ids: jax.Array, starts: jax.Array, room: int) -> tuple[jax.Array, Any]:
    """Read right-aligned prompts.

    Args:
        token_ids: int32 `[batch, length]`.
        starts: int32 `[batch]`, where each prompt begins.
        room: new tokens that the cache has place for.

    Returns:
        The last hidden states `[batch, hidden]`, and the cache.
    """
    batch, length = token_ids.shape
    cache = empty_cache(task, batch, length + room)
    with seen_from(task.backbone, starts):
        _, hidden, cache = task.call_with_cache(
            token_ids=token_ids, cache=cache, cache_update_index=0
        )
    return hidden[:, -1], cache


def decode_step(
    task: Any, tokens: jax.Array, cache: Any, place: Any, starts: jax.Array
) -> tuple[jax.Array, Any]:
    """Float32 logits `[batch, vocabulary]` after one more token a row, int32 `[batch]`."""
    with seen_from(task.backbone, starts):
        logits, _, cache = task.call_with_cache(
            token_ids=tokens[:, None], cache=cache, cache_update_index=place
        )
    return jnp.asarray(logits[:, 0], jnp.float32), cache


def greedy(logits: jax.Array, _turn: Any) -> jax.Array:
    """The likeliest token of each row: greedy decoding."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def decode(
    first: jax.Array,
    follow: Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]],
    cache: Any,
    limit: int,
    stop_ids: Sequence[int],
    choose: Callable[[jax.Array, Any], jax.Array] = greedy,
) -> jax.Array:
    """The loop of decoding.

    Args:
        first: float32 `[batch, vocabulary]`, logits after the prompts.
        follow: gives logits and cache after a token a row, the cache, and the turn, from 0.
        limit: the most new tokens a row.
        stop_ids: decoding ends once every row has had one of these.
        choose: gives the next token of each row, int32 `[batch]`, from logits and their number.

    Returns:
        int32 `[batch, limit]`; what follows a row's first stop token is meaningless.
    """
    stops = jnp.array(stop_ids, jnp.int32)

    def ended(done: jax.Array, tokens: jax.Array) -> jax.Array:
        return done | jnp.isin(tokens, stops)

    tokens = choose(first, 0)
    answers = jnp.zeros((len(tokens), limit), jnp.int32).at[:, 0].set(tokens)

    def going(state: Any) -> Any:
        turn, _, done, _, _ = state
        return (turn < limit - 1) & ~done.all()

    def again(state: Any) -> Any:
        turn, tokens, done, answers, cache = state
        logits, cache = follow(tokens, cache, turn)
        tokens = choose(logits, turn + 1)
        answers = jax.lax.dynamic_update_slice(answers, tokens[:, None], (0, turn + 1))
        return turn + 1, tokens, ended(done, tokens), answers, cache

    done = ended(jnp.zeros(len(tokens), bool), tokens)
    state = jax.lax.while_loop(going, again, (jnp.int32(0), tokens, done, answers, cache))
    found: jax.Array = state[3]
    return found


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: above 0; logits are divided by it.
        top_p: draw among the likeliest tokens that together have this probability (nucleus
            sampling, Holtzman et al. 2020).
        top_k: draw among so many of the likeliest tokens.
        seed: the same seed gives the same text for the same prompt, on the same machine.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def sampler(self, vocabulary: int) -> Any:
        """KerasHub's sampler for this; to be made outside of traced functions."""
        k = None if self.top_k is None else min(self.top_k, vocabulary)
        if self.top_p < 1:
            return samplers.TopPSampler(self.top_p, k, temperature=self.temperature)
        if k is not None:
            return samplers.TopKSampler(k, temperature=self.temperature)
        return samplers.RandomSampler(temperature=self.temperature)

    def state(self, number: int) -> np.ndarray:
        """The state that the sampler's generator begins batch `number` with: uint32 `[2]`."""
        return np.random.SeedSequence([self.seed, number]).generate_state(2)


@dataclass(frozen=True)
class SamplerState:
    """A sampler inside a traced function, with the state of its generator there."""

    sampler: Any
    state: jax.Array
    """uint32 `[2]`: a seed, and how many draws there were."""

    def mapping(self, draws: Any = 0) -> list[tuple[Any, jax.Array]]:
        """The sampler's variable and its value after so many draws, for a `StatelessScope`."""
        (variable,) = self.sampler.variables
        passed = jnp.array([0, 1], jnp.uint32) * jnp.asarray(draws, jnp.uint32)
        return [(variable, jnp.asarray(self.state, jnp.uint32) + passed)]

    def choose(self, logits: jax.Array, turn: Any) -> jax.Array:
        """The next token of each row, int32 `[batch]`, from its logits and their number."""
        with keras.StatelessScope(state_mapping=self.mapping(turn)):
            chosen = self.sampler.get_next_token(self.sampler.compute_probabilities(logits))
        return jnp.asarray(chosen, jnp.int32)
