"""What training changes, and the name of each of its arrays.

Steps use tuples, which JAX and Keras take in a fixed order. Checkpoints use names, so an array is
never mistaken for another: `lora/<layer path>/a`, `optimizer/lora/<layer path>/a/momentum`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from job.errors import StageError
from job.model.lora import LoraLayout, LoraWeights, flatten_lora, unflatten_lora

_BEST = "best/"
_OPTIMIZER_PATH = re.compile(r"[^/]+/(?:lora_(\d+)_?)?(.*)")


class TrainState(NamedTuple):
    """What a step changes: the LoRA weights and the optimizer's variables."""

    lora: LoraWeights
    optimizer: tuple[jax.Array, ...]


class StateNames:
    """The names of the arrays of a training state."""

    def __init__(self, layout: LoraLayout, optimizer: Any) -> None:
        """Name the variables of an optimizer built by `make_optimizer` for this layout."""
        self._lora = [f"lora/{t.path}/{factor}" for t in layout.targets for factor in ("a", "b")]
        self._optimizer = []
        for variable in optimizer.variables:
            match = _OPTIMIZER_PATH.fullmatch(variable.path)
            assert match is not None
            parameter = f"{self._lora[int(match[1])]}/" if match[1] else ""
            self._optimizer.append(f"optimizer/{parameter}{match[2]}")

    def to_arrays(self, state: TrainState, best: LoraWeights | None = None) -> dict[str, Any]:
        """Return the arrays of a state, and those of the best adapter so far, by name."""
        arrays = dict(zip(self._lora, flatten_lora(state.lora), strict=True))
        arrays |= dict(zip(self._optimizer, state.optimizer, strict=True))
        if best is not None:
            names = [_BEST + name for name in self._lora]
            arrays |= dict(zip(names, flatten_lora(best), strict=True))
        return arrays

    def from_arrays(
        self, arrays: Mapping[str, Any], *, best: bool
    ) -> tuple[TrainState, LoraWeights | None]:
        """Return the state, and the best adapter where there is one, from arrays by name.

        Raises:
            StageError: a name is missing or unknown.
        """
        best_names = [_BEST + name for name in self._lora] if best else []
        expected = {*self._lora, *self._optimizer, *best_names}
        if differences := sorted(expected ^ arrays.keys()):
            name = differences[0]
            problem = "lacks" if name in expected else "has an unknown array"
            raise StageError(
                f"training: the checkpoint {problem} {name} ({len(differences)} names differ); "
                "run the same command with --fresh"
            )

        def lora(names: list[str]) -> LoraWeights:
            return unflatten_lora([arrays[name] for name in names])

        state = TrainState(lora(self._lora), tuple(arrays[name] for name in self._optimizer))
        return state, lora(best_names) if best else None
