"""What is looked for in examples: length, duplicates, remains of markup, what should not leak.

All works on columns. The patterns are looked for at once first, and one by one only where that
found something.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from job.chat.templates import CONTROL_PATTERN
from job.data.columnar import ExampleColumns
from job.data.examples import SEPARATOR, exact_hash, normal_form, opening
from job.spec.schema import Checks


class HashSet:
    """A set of 64-bit hashes that grows by arrays."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    def repeated(self, hashes: np.ndarray) -> np.ndarray:
        """Which of these came before, in the set or earlier in this very array.

        Args:
            hashes: uint64 `[n]`.

        Returns:
            bool `[n]`.
        """
        ordered = np.sort(hashes)
        if not (ordered[1:] == ordered[:-1]).any() and not self.holds(ordered).any():
            return np.zeros(len(hashes), bool)  # as nearly always
        values, first = np.unique(hashes, return_index=True)
        before = np.ones(len(hashes), bool)
        before[first] = self.holds(values)
        return before

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Which of these are in the set: bool `[n]`; fastest where they are sorted."""
        found = np.zeros(len(hashes), bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            found |= run[place] == hashes
        return found

    def add(self, hashes: np.ndarray) -> None:
        """Put these into the set."""
        fresh = np.unique(hashes)
        self.add_new(fresh[~self.holds(fresh)])

    def add_new(self, hashes: np.ndarray) -> None:
        """Put these, which are all different and not in it yet, into the set."""
        if not len(hashes):
            return
        self._runs.append(np.sort(hashes))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            merged = np.concatenate([self._runs.pop(), self._runs.pop()])
            merged.sort(kind="stable")  # merges what is sorted already
            self._runs.append(merged)


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


Flags = dict[str, np.ndarray]
"""By the name of a pattern: which examples it holds for, bool `[examples]`."""


@dataclass(frozen=True)
class TextStats:
    """The texts of some examples, and their lengths; arrays are `[examples]`.

    system, dialogues: the texts of each (see `examples.dialogue`).
    lengths: characters of prompts and responses, int `[2, examples]`.
    size: bytes of prompt and response, int.
    short, long: bool.
    """

    system: pa.DictionaryArray
    dialogues: pa.Array
    lengths: np.ndarray
    size: np.ndarray
    short: np.ndarray
    long: np.ndarray


def text_stats(mapped: ExampleColumns, checks: Checks) -> TextStats:
    """Look at every example."""
    system = pc.fill_null(mapped.system, "").dictionary_encode()
    dialogues = mapped.dialogues()
    sides = mapped.prompt, mapped.response
    sizes = [_numbers(pc.binary_length(texts)) for texts in sides]
    plain = all(_is_ascii(texts) for texts in sides)
    lengths = sizes if plain else [_numbers(pc.utf8_length(texts)) for texts in sides]
    short = np.minimum(*lengths) < checks.min_characters
    long = np.zeros(len(mapped), bool)
    most = checks.max_characters
    if most and _longest(system.dictionary) + _longest(dialogues) >= most:
        before = _numbers(pc.utf8_length(system.dictionary)) + len(SEPARATOR)
        whole = before[system.indices.to_numpy()] + _numbers(pc.utf8_length(dialogues))
        long = whole > most
    return TextStats(system, dialogues, np.stack(lengths), np.add(*sizes), short, long)


def find_flags(looked: TextStats) -> Flags:
    """Which patterns hold for each example; nearly all of it is Arrow's work."""
    faults = _matches(looked.dialogues)
    for name, found in _matches(looked.system.dictionary).items():
        if found.any():
            faults[name] |= found[looked.system.indices.to_numpy()]
    return faults


def content_hashes(looked: TextStats) -> np.ndarray:
    """Equal where the content is the same, and where its letters and digits are.

    Returns:
        uint64 `[2, examples]`.
    """
    raw = looked.dialogues.cast(pa.binary()).to_pylist()
    numbers = looked.system.indices.to_pylist()
    openings = [opening(text) for text in looked.system.dictionary.to_pylist()]
    normal_openings = [normal_form(text) for text in openings]

    def hashes(begin: list[bytes], texts: Iterable[bytes]) -> bytes:
        return b"".join(map(exact_hash, map(operator.add, map(begin.__getitem__, numbers), texts)))

    exact, normal = hashes(openings, raw), hashes(normal_openings, map(normal_form, raw))
    return np.frombuffer(exact + normal, np.uint64).reshape(2, len(raw))


def excerpt(looked: TextStats, number: int, fault: str) -> str:
    """The text around what a check found in one example; its beginning for other faults."""
    dialogue, at = looked.dialogues[number], 0
    if fault in PATTERNS:
        at = pc.find_substring_regex(dialogue, PATTERNS[fault]).as_py()
        if at < 0:
            dialogue = pa.scalar(looked.system[number].as_py())
            at = pc.find_substring_regex(dialogue, PATTERNS[fault]).as_py()
    begin = max(0, at - _AROUND)
    cut: str = dialogue.as_py().encode()[begin : begin + 4 * _AROUND].decode(errors="ignore")
    return cut.replace(SEPARATOR, " | ")


def _longest(texts: pa.Array) -> int:
    """Bytes of the longest."""
    return pc.max(pc.binary_length(texts)).as_py() or 0


def _is_ascii(texts: pa.Array) -> bool:
    content = texts.buffers()[2]
    return not content or bool(np.frombuffer(content, np.uint8).max(initial=0) < 128)


def _numbers(array: pa.Array) -> np.ndarray:
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _mask(array: pa.Array) -> np.ndarray:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=bool)


def _matches(texts: pa.Array) -> Flags:
    suspects = np.flatnonzero(_mask(pc.match_substring_regex(texts, _ANY)))
    found = {name: np.zeros(len(texts), bool) for name in PATTERNS}
    if len(suspects):
        texts = texts.take(pa.array(suspects))
        for name, pattern in PATTERNS.items():
            found[name][suspects] = _mask(pc.match_substring_regex(texts, pattern))
    return found


@dataclass(frozen=True)
class FilterResult:
    """What becomes of examples: bool `[examples]` each."""

    kept: np.ndarray
    dropped: dict[str, np.ndarray]
    """By reason; an example has one reason, the first that applies."""
    found: Flags
    """Those of what is kept, and duplicates."""


class RowFilter:
    """Decides example after example what is kept, and remembers what was."""

    def __init__(self, checks: Checks, *, drop_duplicates: bool) -> None:
        self._checks = checks
        self._drop_duplicates = drop_duplicates
        self._hashes = HashSet()
        self._groups = HashSet()

    def remember(self, hashes: np.ndarray, groups: np.ndarray) -> None:
        """These examples were kept."""
        self._hashes.add(hashes)
        self._groups.add(groups)

    def decide(
        self, looked: TextStats, faults: Flags, hashes: np.ndarray, groups: np.ndarray
    ) -> FilterResult:
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
            if name in faults:
                drop(name.replace("_", " "), faults[name])
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
        found = {name: mask & left for name, mask in faults.items()}
        found[DUPLICATES] = same & left
        found[NORMALISED] = alike & ~same & left
        self._hashes.add_new(hashes[left & ~same])
        self._groups.add_new(groups[left & ~alike])
        return FilterResult(left, dropped, found)

    @staticmethod
    def _repeated(seen: HashSet, hashes: np.ndarray, among: np.ndarray) -> np.ndarray:
        before = np.zeros(len(hashes), bool)
        before[among] = seen.repeated(hashes[among])
        return before
