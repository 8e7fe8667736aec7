"""Damages of files: cut, emptied, flipped, and the like."""

import random
from collections.abc import Callable


def damage(content: bytes, chance: random.Random) -> tuple[str, bytes | None]:
    """Return a name and a damaged content; None is a missing file."""
    at = chance.randrange(len(content) + 1)
    kinds: dict[str, Callable[[], bytes | None]] = {
        "missing": lambda: None,
        "empty": lambda: b"",
        "cut": lambda: content[:at],
        "flipped": lambda: _flip(content, chance),
        "zeros": lambda: content[:at] + bytes(len(content[at : at + 64])) + content[at + 64 :],
        "doubled": lambda: content + content,
        "other": lambda: chance.choice(
            [b"null", b"[]", b"{}", b'{"a": 1}', b"\xff\xfe", b"a: &b", b"[" * 99999]
        ),
    }
    name = chance.choice(list(kinds))
    return name, kinds[name]()


def _flip(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return b"x"
    changed = bytearray(content)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)
