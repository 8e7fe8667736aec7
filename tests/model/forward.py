"""KerasHub's own forward pass with a model's weights, to compare this project's with."""

import jax
import keras
import numpy as np

from job.model.language_model import LanguageModel
from job.model.lora import Weights


def full_logits(
    model: LanguageModel, weights: Weights, token_ids: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """Float32 logits `[batch, length, vocabulary]` of unpacked rows, with a padding mask.

    As one program: to compile each operation alone takes four times as long.
    """

    def forward(weights: Weights, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
        variables = zip(model.backbone.variables, weights, strict=True)
        with keras.StatelessScope(state_mapping=list(variables)):
            hidden = model.backbone(model.inputs(token_ids, mask))
        logits: jax.Array = model.logits(weights, hidden)
        return logits

    mask = np.ones_like(token_ids) if mask is None else mask
    return np.asarray(jax.jit(forward)(weights, token_ids, mask))
