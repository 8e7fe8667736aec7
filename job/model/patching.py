"""The one place that patches Keras layers.

KerasHub's layers hold a model's structure. A variant of it (packed attention, LoRA branches,
rematerialized blocks, ...) is traced by replacing single methods of single layers; once traced,
every layer is as it was.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

_MISSING = object()


class Patch(NamedTuple):
    """A replacement for one attribute of one object."""

    target: Any
    """A Keras layer or task, or a class."""
    name: str
    """Attribute name, usually a method's."""
    replacement: Any
    """A function; receives `self` only when the target is a class."""


@contextlib.contextmanager
def patched(patches: Sequence[Patch]) -> Iterator[None]:
    """Apply patches within a `with` block, then restore exactly what was there.

    Patches go straight into the object's own dictionary, past Keras' attribute tracking.
    """
    originals = [(p.target, p.name, vars(p.target).get(p.name, _MISSING)) for p in patches]
    for patch in patches:
        _set(patch.target, patch.name, patch.replacement)
    try:
        yield
    finally:
        for target, name, original in reversed(originals):
            _set(target, name, original)


def output_patch(layer: Any, change: Callable[[Any], Any]) -> Patch:
    """Return a patch that passes the output of a layer's call through `change`."""
    original = layer.call
    return Patch(layer, "call", lambda x, *args, **kwargs: change(original(x, *args, **kwargs)))


def _set(target: Any, name: str, value: Any) -> None:
    own: Any = type if isinstance(target, type) else object
    if value is not _MISSING:
        own.__setattr__(target, name, value)
    elif name in vars(target):
        own.__delattr__(target, name)
