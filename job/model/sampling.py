"""Sampled decoding, by KerasHub's samplers; greedy decoding needs none of this."""

from dataclasses import dataclass
from typing import Any

import numpy as np


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
        from keras_hub import samplers

        k = None if self.top_k is None else min(self.top_k, vocabulary)
        if self.top_p < 1:
            return samplers.TopPSampler(self.top_p, k, temperature=self.temperature)
        if k is not None:
            return samplers.TopKSampler(k, temperature=self.temperature)
        return samplers.RandomSampler(temperature=self.temperature)

    def state(self, number: int) -> np.ndarray:
        """The state of the sampler's generator at the beginning of batch `number`: uint32 [2]."""
        return np.random.SeedSequence([self.seed, number]).generate_state(2)
