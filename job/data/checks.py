"""What is looked for in examples: length, duplicates, remains of markup, what should not leak.

All works on columns. The patterns are looked for at once first, and one by one only where that
found something.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from job.data.chat import CONTROL_PATTERN
from job.data.examples import SEPARATOR, exact_hash, normal_form
from job.data.mapping import Mapped
from job.data.seen import Seen
from job.spec import Checks

CHAT_MARKUP = "chat_markup"
NORMALISED = "normalised_duplicates"
DUPLICATES = "duplicates"
CONTAMINATED = "contaminated"

PATTERNS = {
    # Control and invisible characters (line breaks and tabs are fine), and the mark that
    # decoders leave where text was damaged.
    "control_characters": r"[\x00-\x08\x0b\x0c\x0e-\x1e\x7f-\x{9f}\x{200b}\x{202a}-\x{202e}"
    r"\x{2066}-\x{2069}\x{feff}\x{fffd}]",
    "html": r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>"
    r"|&(?:amp|lt|gt|quot|apos|nbsp|#[0-9]{1,6}|#x[0-9a-fA-F]{1,6});",
    "urls": r"(?:https?://|[Ww]{3}\.)[^\s]|[A-Za-z0-9]\.(?:com|org|net|edu|gov)\b",
    "emails": r"[A-Za-z0-9._%+-]@[A-Za-z0-9-]+\.[A-Za-z]",
    "phone_numbers": r"(?:\d[ ().-]{0,2}){8,14}\d",
    CHAT_MARKUP: CONTROL_PATTERN,
}
"""RE2 patterns of what is counted, by name."""

_AROUND = 60
"""Bytes that are shown before what was found."""

_ANY = "|".join(
    (
        PATTERNS["control_characters"],
        r"[<@\[]",
        r"&[a-z#]",
        r"://",
        r"[Ww]{3}\.",
        r"[A-Za-z0-9]\.(?:com|org|net|edu|gov)",
        r"(?:\d[ ().-]{0,2}){8}\d",
    )
)
"""Holds for every text that a pattern holds for."""


@dataclass(frozen=True)
class Looked:
    """What the checks see in some examples without Python's own work; arrays are `[examples]`.

    contents: the whole text of each (see `examples.content`).
    prompt, response: their lengths in characters, int.
    faults: bool by name.
    short, long: bool.
    """

    contents: pa.Array
    prompt: np.ndarray
    response: np.ndarray
    faults: dict[str, np.ndarray]
    short: np.ndarray
    long: np.ndarray


def look(mapped: Mapped, checks: Checks) -> Looked:
    """Look at every example."""
    contents = mapped.contents()
    prompt, response = _characters(mapped.prompt), _characters(mapped.response)
    short = np.minimum(prompt, response) < checks.min_characters
    long = np.zeros(len(mapped), bool)
    most = checks.max_characters
    if most and (pc.max(pc.binary_length(contents)).as_py() or 0) > most:
        long = _characters(contents) > most
    return Looked(contents, prompt, response, _faults(contents), short, long)


def hashes_of(looked: Looked) -> tuple[np.ndarray, np.ndarray]:
    """Equal where the text is the same, and where its letters and digits are: uint64 each."""
    raw = looked.contents.cast(pa.binary()).to_pylist()
    exact = b"".join([exact_hash(text) for text in raw])
    normal = b"".join([exact_hash(normal_form(text)) for text in raw])
    return np.frombuffer(exact, np.uint64), np.frombuffer(normal, np.uint64)


def excerpt(contents: pa.Array, number: int, fault: str) -> str:
    """The text around what a check found in one example; its beginning for other faults."""
    text = contents[number].as_py().encode()
    at = 0
    if fault in PATTERNS:
        at = max(0, pc.find_substring_regex(contents[number], PATTERNS[fault]).as_py() - _AROUND)
    cut: str = text[at : at + 4 * _AROUND].decode(errors="ignore")
    return cut.replace(SEPARATOR, " | ")


def _characters(texts: pa.Array) -> np.ndarray:
    return np.asarray(pc.utf8_length(texts).to_numpy(zero_copy_only=False))


def _mask(array: pa.Array) -> np.ndarray:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=bool)


def _faults(contents: pa.Array) -> dict[str, np.ndarray]:
    suspects = np.flatnonzero(_mask(pc.match_substring_regex(contents, _ANY)))
    found = {name: np.zeros(len(contents), bool) for name in PATTERNS}
    if len(suspects):
        texts = contents.take(pa.array(suspects))
        for name, pattern in PATTERNS.items():
            found[name][suspects] = _mask(pc.match_substring_regex(texts, pattern))
    return found


@dataclass(frozen=True)
class Fate:
    """What becomes of examples: bool `[examples]` each."""

    kept: np.ndarray
    dropped: dict[str, np.ndarray]
    """By reason; an example has one reason, the first that applies."""
    found: dict[str, np.ndarray]
    """Faults of those that are kept, by name."""


class Judge:
    """Decides example after example what is kept, and remembers what was."""

    def __init__(self, checks: Checks, *, drop_duplicates: bool) -> None:
        self._checks = checks
        self._drop_duplicates = drop_duplicates
        self._hashes = Seen()
        self._groups = Seen()

    def remember(self, hashes: np.ndarray, groups: np.ndarray) -> None:
        """These examples were kept."""
        self._hashes.add(hashes)
        self._groups.add(groups)

    def decide(self, looked: Looked, hashes: np.ndarray, groups: np.ndarray) -> Fate:
        """The fate of examples that follow those before; what is kept is remembered."""
        left = np.ones(len(hashes), bool)
        dropped: dict[str, np.ndarray] = {}

        def drop(reason: str, mask: np.ndarray) -> None:
            hit = mask & left
            if hit.any():
                dropped[reason] = hit
                left[hit] = False

        drop("too short", looked.short)
        drop("too long", looked.long)
        for name in self._checks.drop:
            if name in looked.faults:
                drop(name.replace("_", " "), looked.faults[name])
        same = self._repeated(self._hashes, hashes, left)
        alike = self._repeated(self._groups, groups, left)
        if NORMALISED in self._checks.drop:
            originals = hashes[left & ~alike]
            known = np.isin(hashes, originals) | self._hashes.holds(hashes)
            drop("duplicate", alike & known)
            drop("normalised duplicate", alike)
        elif self._drop_duplicates:
            drop("duplicate", same)
            alike = self._repeated(self._groups, groups, left)
        found = {name: mask & left for name, mask in looked.faults.items()}
        found[DUPLICATES] = same & left
        found[NORMALISED] = alike & ~same & left
        self._hashes.add_new(hashes[left & ~same])
        self._groups.add_new(groups[left & ~alike])
        return Fate(left, dropped, found)

    @staticmethod
    def _repeated(seen: Seen, hashes: np.ndarray, among: np.ndarray) -> np.ndarray:
        before = np.zeros(len(hashes), bool)
        before[among] = seen.repeated(hashes[among])
        return before
