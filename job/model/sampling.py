"""Sampled decoding, by KerasHub's samplers; greedy decoding needs none of this."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras_hub import samplers


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
class Drawn:
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
