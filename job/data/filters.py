"""Checks of examples: length, duplicates, left-over markup, personal data.

All checks work on columns. One pattern that covers all others is matched first, so that the others
are matched only against the few texts that contain one of them.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from job.chat.text_tokenizer import CONTROL_PATTERN
from job.data.columnar import ExampleColumns
from job.data.examples import SEPARATOR, exact_hash, normal_form, opening
from job.spec.schema import Checks


class HashSet:
    """A set of 64-bit hashes, grown by arrays."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def repeated(self, hashes: np.ndarray) -> np.ndarray:
        """Return which hashes are in the set or earlier in the array: uint64 to bool `[n]`."""
        values, first = np.unique(hashes, return_index=True)
        before = np.ones(len(hashes), bool)
        before[first] = self.holds(values)
        return before

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Return which hashes are in the set: bool `[n]`; fastest if they are sorted."""
        present = np.zeros(len(hashes), bool)
        for run in self._runs:
            index = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            present |= run[index] == hashes
        return present

    def add(self, hashes: np.ndarray) -> None:
        """Add hashes."""
        run = np.unique(hashes)
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # a merge of two sorted runs
        if len(run):
            self._runs.append(run)


CHAT_MARKUP = "chat_markup"
NEAR_DUPLICATES = "normalised_duplicates"
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
"""RE2 patterns of flags, by name."""

_SEPARATOR = SEPARATOR.encode()
_CONTEXT_BYTES = 60
"""Bytes shown before a match."""

_ANY = "|".join(PATTERNS.values())

Masks = dict[str, np.ndarray]
"""Which examples something applies to, bool `[examples]`, by its name."""


@dataclass(frozen=True)
class CheckedExamples:
    """Examples with what their texts show."""

    columns: ExampleColumns
    system: pa.DictionaryArray
    dialogues: pa.Array
    """The texts of all turns (`Example.text`)."""
    text_bytes: np.ndarray
    """Bytes of prompt and response together, int `[examples]`."""
    lengths: Masks
    """Those that are too short and too long."""
    flags: Masks
    """Those that each pattern matches."""
    hashes: np.ndarray
    """See `content_hashes`."""


def check_examples(examples: ExampleColumns, checks: Checks) -> CheckedExamples:
    """Measure examples, match the patterns, and hash what tells the examples apart.

    Arrow matches the patterns, nearly all of that without the GIL.
    """
    system = pc.fill_null(examples.batch["system"], "").dictionary_encode()
    dialogues = examples.dialogues()
    sides = examples.batch["prompt"], examples.batch["response"]
    short = np.minimum(*(pc.utf8_length(texts).to_numpy() for texts in sides))
    before = pc.utf8_length(system.dictionary).to_numpy() + len(SEPARATOR)
    characters = before[system.indices.to_numpy()] + pc.utf8_length(dialogues).to_numpy()
    flags = _matches(dialogues)
    for name, matches in _matches(system.dictionary).items():
        if matches.any():
            flags[name] |= matches[system.indices.to_numpy()]
    return CheckedExamples(
        examples,
        system,
        dialogues,
        text_bytes=np.add(*(pc.binary_length(texts).to_numpy() for texts in sides)),
        lengths={
            "too short": short < checks.min_characters,
            "too long": characters > (checks.max_characters or np.inf),
        },
        flags=flags,
        hashes=content_hashes(examples, system, dialogues),
    )


def content_hashes(
    examples: ExampleColumns, system: pa.DictionaryArray, dialogues: pa.Array
) -> np.ndarray:
    """Hash what tells examples apart.

    Returns:
        uint64 `[4, examples]`: equal for duplicates; for near-duplicates, which have the same
        letters and digits; for the same letters and digits of the opening prompt; and for what
        the split keeps together, the latter or what the column `data.group` names.
    """
    raw = dialogues.cast(pa.binary()).to_pylist()
    numbers = system.indices.to_pylist()
    openings = [opening(text) for text in system.dictionary.to_pylist()]
    normal_openings = [normal_form(text) for text in openings]
    normal = [*map(normal_form, raw)]
    prompts = [text.partition(_SEPARATOR)[0] for text in normal]
    for number, prompt in examples.first_prompts():
        prompts[number] = normal_form(prompt.encode()) or prompt.encode()
    if not all(prompts):  # some are signs alone
        written = (text.partition(_SEPARATOR)[0] for text in raw)
        prompts = [form or text for form, text in zip(prompts, written, strict=True)]

    def hashes(begin: list[bytes], texts: Iterable[bytes]) -> bytes:
        return b"".join(map(exact_hash, map(operator.add, map(begin.__getitem__, numbers), texts)))

    by_prompt = b"".join(map(exact_hash, prompts))
    by_group = by_prompt
    if not examples.groups.null_count:
        by_group = b"".join(map(exact_hash, examples.groups.cast(pa.binary()).to_pylist()))
    all_hashes = hashes(openings, raw) + hashes(normal_openings, normal) + by_prompt + by_group
    return np.frombuffer(all_hashes, np.uint64).reshape(4, len(raw))


def excerpt(checked: CheckedExamples, number: int, flag: str) -> str:
    """Return the text around a flag's match in one example, or the beginning of the example."""
    text, at = checked.dialogues[number], 0
    if flag in PATTERNS:
        at = pc.find_substring_regex(text, PATTERNS[flag]).as_py()
        if at < 0:
            text = pa.scalar(checked.system[number].as_py())
            at = pc.find_substring_regex(text, PATTERNS[flag]).as_py()
    begin = max(0, at - _CONTEXT_BYTES)
    part: str = text.as_py().encode()[begin : begin + 4 * _CONTEXT_BYTES].decode(errors="ignore")
    return part.replace(SEPARATOR, " | ")


def _mask(array: pa.Array) -> np.ndarray:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=bool)


def _matches(texts: pa.Array) -> Masks:
    suspects = np.flatnonzero(_mask(pc.match_substring_regex(texts, _ANY)))
    flags = {name: np.zeros(len(texts), bool) for name in PATTERNS}
    if len(suspects):
        texts = texts.take(pa.array(suspects))
        for name, pattern in PATTERNS.items():
            flags[name][suspects] = _mask(pc.match_substring_regex(texts, pattern))
    return flags


@dataclass(frozen=True)
class FilterResult:
    """The outcome of examples."""

    keep: np.ndarray
    """bool `[examples]`."""
    dropped: Masks
    """The dropped examples by reason: for each the first that applies."""
    flagged: Masks
    """The flags of kept examples, duplicates included."""


class RowFilter:
    """Decides which examples to keep, and remembers their hashes to recognize duplicates."""

    def __init__(self, checks: Checks, *, drop_duplicates: bool) -> None:
        self._checks = checks
        self._drop_duplicates = drop_duplicates
        self._hashes = HashSet()
        self._groups = HashSet()

    def remember(self, hashes: np.ndarray, groups: np.ndarray) -> None:
        """Add the hashes of earlier examples."""
        self._hashes.add(hashes)
        self._groups.add(groups)

    def apply(self, checked: CheckedExamples) -> FilterResult:
        """Filter the next examples."""
        flags, hashes, groups = checked.flags, *checked.hashes[:2]
        keep = np.ones(len(hashes), bool)
        dropped: Masks = {}

        def drop(reason: str, mask: np.ndarray) -> None:
            hit = mask & keep
            if hit.any():
                dropped[reason] = hit
                keep[hit] = False

        for reason, mask in checked.lengths.items():
            drop(reason, mask)
        for name in self._checks.drop:
            if name in flags:
                drop(name.replace("_", " "), flags[name])
        duplicate = self._repeated(self._hashes, hashes, keep)
        near_duplicate = self._repeated(self._groups, groups, keep)
        if NEAR_DUPLICATES in self._checks.drop:
            originals = hashes[keep & ~near_duplicate]
            known = np.isin(hashes, originals) | self._hashes.holds(hashes)
            drop("duplicate", near_duplicate & known)
            drop("normalised duplicate", near_duplicate)
        elif self._drop_duplicates:
            drop("duplicate", duplicate)
            near_duplicate = self._repeated(self._groups, groups, keep)
        flagged = {name: mask & keep for name, mask in flags.items()}
        flagged[DUPLICATES] = duplicate & keep
        flagged[NEAR_DUPLICATES] = near_duplicate & ~duplicate & keep
        self._hashes.add(hashes[keep & ~duplicate])
        self._groups.add(groups[keep & ~near_duplicate])
        return FilterResult(keep, dropped, flagged)

    @staticmethod
    def _repeated(seen: HashSet, hashes: np.ndarray, keep: np.ndarray) -> np.ndarray:
        repeated = np.zeros(len(hashes), bool)
        repeated[keep] = seen.repeated(hashes[keep])
        return repeated
