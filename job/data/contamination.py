"""Whether the questions of the evaluations stand in the text that is trained on.

A question is found in an example if they share a passage of 13 words in a row, or the whole
question where that is shorter (Brown et al. 2020, appendix C, use 13 words too). Case,
spacing and signs do not count. Questions of fewer than five words are not looked for: they
would be found anywhere.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel

from job.data.columnar import turn_texts
from job.data.dataset import close_shard, open_shard
from job.data.examples import Example

if TYPE_CHECKING:
    from job.data.staging import StagedDataset


KEY = "evals/contamination.json"


WORDS = 13


_FEWEST = 5


_WORD = re.compile(r"\w+")


_FACTORS = np.array([pow(0x9E3779B97F4A7C15, n, 2**64) for n in range(1, _FEWEST + 1)], np.uint64)


_AT_ONCE = 256


_PAIRS = 100


@dataclass(frozen=True)
class Hit:
    """A question found in a text."""

    text: int
    """Number of the text among those searched."""
    question: int
    """Number of the question."""
    passage: str
    """The words that both have."""


class Passages:
    """The passages of some questions, to be looked for in many texts."""

    def __init__(self, questions: Iterable[str]) -> None:
        self._numbers: dict[str, int] = {}
        self._words: list[str] = [""]
        self._passages: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        self.too_short = 0
        for number, question in enumerate(questions):
            words = _WORD.findall(question.casefold())
            if len(words) < _FEWEST:
                self.too_short += 1
                continue
            ids = [self._number(word) for word in words]
            size = min(WORDS, len(ids))
            starts = _rolling(np.array(ids, np.uint64))
            for at in range(len(ids) - size + 1):
                known = self._passages.setdefault(int(starts[at]), [])
                known.append((tuple(ids[at : at + size]), number))
        self._starts = np.array(sorted(self._passages), np.uint64)

    def _number(self, word: str) -> int:
        number = self._numbers.setdefault(word, len(self._words))
        if number == len(self._words):
            self._words.append(word)
        return number

    def search(self, texts: Sequence[str]) -> Iterator[Hit]:
        """All hits in these texts, each pair of text and question once."""
        if not len(self._starts):
            return
        get = self._numbers.get
        per_text = [[get(w, 0) for w in _WORD.findall(text.casefold())] for text in texts]
        # A word that no question has keeps passages from reaching over the end of a text.
        ids = [number for numbers in per_text for number in (*numbers, 0)]
        if len(ids) < _FEWEST:
            return
        ends = np.cumsum([len(numbers) + 1 for numbers in per_text])
        rolling = _rolling(np.array(ids, np.uint64))
        places = np.minimum(np.searchsorted(self._starts, rolling), len(self._starts) - 1)
        seen: set[tuple[int, int]] = set()
        for at in np.flatnonzero(self._starts[places] == rolling).tolist():
            for passage, question in self._passages[int(rolling[at])]:
                text = int(np.searchsorted(ends, at, side="right"))
                pair = (text, question)
                if pair not in seen and tuple(ids[at : at + len(passage)]) == passage:
                    seen.add(pair)
                    yield Hit(text, question, " ".join(self._words[n] for n in passage))


def _rolling(ids: np.ndarray) -> np.ndarray:
    """A hash of every `_FEWEST` words in a row: uint64 `[words - _FEWEST + 1]`."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, _FEWEST)
    with np.errstate(over="ignore"):
        hashes: np.ndarray = (windows * _FACTORS).sum(axis=1, dtype=np.uint64)
    return hashes


class Pair(BaseModel):
    """A question and the example it was found in."""

    eval: str
    question: str
    example: str
    passage: str


class Overlap(BaseModel):
    """How many questions of a slice were found."""

    questions: int
    too_short: int
    found: int


class Contamination(BaseModel):
    """`evals/contamination.json`: what the training examples share with the questions."""

    words: int
    examples: int
    slices: dict[str, Overlap]
    pairs: list[Pair]
    """The first of them, by example."""


def find_overlap(
    questions: Mapping[str, Mapping[str, str]], examples: Iterable[Example]
) -> Contamination:
    """Look for the questions of every task in the examples.

    Args:
        questions: for each task, the texts of its questions by id.
        examples: the training examples.
    """
    passages = {task: Passages(texts.values()) for task, texts in questions.items()}
    ids = {task: list(texts) for task, texts in questions.items()}
    matched: dict[str, set[str]] = {task: set() for task in questions}
    pairs: list[Pair] = []
    count = 0
    for batch in _batches(examples):
        count += len(batch)
        texts = [text_of(example) for example in batch]
        for task in questions:
            for hit in passages[task].search(texts):
                question = ids[task][hit.question]
                matched[task].add(question)
                if len(pairs) < _PAIRS:
                    pairs.append(
                        Pair(
                            eval=task,
                            question=question,
                            example=batch[hit.text].id,
                            passage=hit.passage,
                        )
                    )
    overlaps = {
        task: Overlap(
            questions=len(ids[task]), too_short=passages[task].too_short, found=len(matched[task])
        )
        for task in questions
    }
    return Contamination(words=WORDS, examples=count, slices=overlaps, pairs=pairs)


def text_of(example: Example) -> str:
    """All that is said in an example, the system text left out."""
    return "\n".join(message.content for message in example.turns)


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def clean_rows(
    questions: Iterable[str], staged: "StagedDataset", work: Path, check_stop: Callable[[], None]
) -> np.ndarray:
    """Return which staged examples share no passage with a question: bool `[examples]`.

    Args:
        questions: texts of the questions.
        staged: the examples.
        work: a scratch folder.
        check_stop: called before each batch; it may raise.
    """
    passages = Passages(questions)
    clean = np.ones(staged.manifest.rows, bool)
    at = 0
    for shard in staged.manifest.shards:
        path = open_shard(staged.store, shard, work)
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_AT_ONCE, columns=["prompt", "response", "history"]):
                check_stop()
                texts = ["\n".join(turn_texts(**row)) for row in batch.to_pylist()]
                clean[[at + hit.text for hit in passages.search(texts)]] = False
                at += len(texts)
        close_shard(path, work)
    return clean
