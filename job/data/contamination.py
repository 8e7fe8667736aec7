"""Contamination: evaluation questions that also occur in the training text.

A question matches an example if they share a passage of 13 consecutive words, or the complete
question if that is shorter (Brown et al. 2020, appendix C, use 13 words too). Case, spacing and
punctuation are ignored. Questions of fewer than five words are not searched: they would match
anywhere. In scripts without spaces two characters count as a word.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel

from job.data.columnar import COLUMNS, example_from_columns
from job.data.examples import Example, normal_form
from job.data.words import is_character, split_words

if TYPE_CHECKING:
    from job.data.staging import StagedDataset


WORDS = 13
_MIN_WORDS = 5
_CHARACTERS_PER_WORD = 2
_FACTORS = np.array(
    [pow(0x9E3779B97F4A7C15, n, 2**64) for n in range(1, _MIN_WORDS + 1)], np.uint64
)
_BATCH_SIZE = 256
_MAX_PAIRS = 100


@dataclass(frozen=True)
class Match:
    """A passage that a question and a text share."""

    text: int
    """Index of the text."""
    question: int
    """Index of the question."""
    passage: str


class Passages:
    """The passages of questions, for searching texts."""

    def __init__(self, questions: Iterable[str]) -> None:
        self._numbers: dict[str, int] = {}
        self._words: list[str] = [""]
        self._passages: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        self.too_short = 0
        for number, question in enumerate(questions):
            words = split_words(question.casefold())
            scale = _CHARACTERS_PER_WORD if 2 * sum(map(is_character, words)) > len(words) else 1
            if len(words) < scale * _MIN_WORDS:
                self.too_short += 1
                continue
            ids = [self._number(word) for word in words]
            size = min(scale * WORDS, len(ids))
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

    def search(self, texts: Sequence[str]) -> Iterator[Match]:
        """Yield the matches in texts, each pair of text and question once."""
        if not len(self._starts):
            return
        get = self._numbers.get
        per_text = [[get(w, 0) for w in split_words(text.casefold())] for text in texts]
        # 0 is a word of no question, so no passage reaches across the end of a text.
        ids = [number for numbers in per_text for number in (*numbers, 0)]
        if len(ids) < _MIN_WORDS:
            return
        ends = np.cumsum([len(numbers) + 1 for numbers in per_text])
        rolling = _rolling(np.array(ids, np.uint64))
        indices = np.minimum(np.searchsorted(self._starts, rolling), len(self._starts) - 1)
        seen: set[tuple[int, int]] = set()
        for at in np.flatnonzero(self._starts[indices] == rolling).tolist():
            for passage, question in self._passages[int(rolling[at])]:
                text = int(np.searchsorted(ends, at, side="right"))
                pair = (text, question)
                if pair not in seen and tuple(ids[at : at + len(passage)]) == passage:
                    seen.add(pair)
                    yield Match(text, question, " ".join(self._words[n] for n in passage))


def _rolling(ids: np.ndarray) -> np.ndarray:
    """Hash every `_MIN_WORDS` consecutive words: uint64 `[words - _MIN_WORDS + 1]`."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, _MIN_WORDS)
    with np.errstate(over="ignore"):
        hashes: np.ndarray = (windows * _FACTORS).sum(axis=1, dtype=np.uint64)
    return hashes


class Pair(BaseModel):
    """A question and a training example that share a passage."""

    eval: str
    question: str
    example: str
    passage: str


class Overlap(BaseModel):
    """The number of questions of a task that occur in the training text."""

    questions: int
    too_short: int
    found: int


class Contamination(BaseModel):
    """The content of `evals/contamination.json`."""

    words: int
    examples: int
    slices: dict[str, Overlap]
    pairs: list[Pair]
    """The first 100 matches, by example."""
    trained_prompts: dict[str, int] = {}
    """For each task with free answers, how many of its prompts are trained on."""


def find_overlap(
    questions: Mapping[str, Mapping[str, str]], examples: Iterable[Example]
) -> Contamination:
    """Search the examples for the questions of every task.

    Args:
        questions: for each task, the texts of its questions by id.
        examples: the training examples.
    """
    passages = {task: Passages(texts.values()) for task, texts in questions.items()}
    ids = {task: list(texts) for task, texts in questions.items()}
    matched: dict[str, set[str]] = {task: set() for task in questions}
    pairs: list[Pair] = []
    count = 0
    for batch in itertools.batched(examples, _BATCH_SIZE):
        count += len(batch)
        texts = [example.text for example in batch]
        for task in questions:
            for match in passages[task].search(texts):
                question = ids[task][match.question]
                matched[task].add(question)
                if len(pairs) < _MAX_PAIRS:
                    pairs.append(
                        Pair(
                            eval=task,
                            question=question,
                            example=batch[match.text].id,
                            passage=match.passage,
                        )
                    )
    overlaps = {
        task: Overlap(
            questions=len(ids[task]), too_short=passages[task].too_short, found=len(matched[task])
        )
        for task in questions
    }
    return Contamination(words=WORDS, examples=count, slices=overlaps, pairs=pairs)


def count_trained_prompts(
    prompts: Mapping[str, Sequence[str]], examples: Iterable[Example]
) -> dict[str, int]:
    """Return how many prompts of each task occur in the examples, but for case and punctuation."""
    forms = {task: [normal_form(text.encode()) for text in each] for task, each in prompts.items()}
    wanted = set().union(*forms.values())
    trained = {
        form
        for example in examples
        for message in example.turns
        if message.role == "user" and (form := normal_form(message.content.encode())) in wanted
    }
    return {task: sum(form in trained for form in each) for task, each in forms.items()}


def clean_rows(
    questions: Iterable[str], staged: "StagedDataset", check_stop: Callable[[], None]
) -> np.ndarray:
    """Return which staged examples share no passage with a question: bool `[examples]`.

    Args:
        questions: texts of the questions.
        staged: the examples.
        check_stop: called before each batch; it may raise.
    """
    passages = Passages(questions)
    clean = np.ones(staged.manifest.rows, bool)
    at = 0
    for shard in staged.manifest.shards:
        with staged.files.open(shard) as path, pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_SIZE, columns=COLUMNS.names):
                check_stop()
                texts = [example_from_columns("", **row).text for row in batch.to_pylist()]
                clean[[at + match.text for match in passages.search(texts)]] = False
                at += len(texts)
    return clean
