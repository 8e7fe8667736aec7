"""Contamination: evaluation questions that also occur in the training text.

A question matches an example if they share a passage of 13 consecutive words, or the complete
question if that is shorter (Brown et al. 2020, appendix C, use 13 words too). Case, spacing and
punctuation are ignored. Questions of fewer than five words are not searched: they would match
anywhere. In scripts without spaces two characters count as a word.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from pydantic import BaseModel

from job.data.columnar import COLUMNS, example_from_columns
from job.data.dataset import StagedDataset
from job.data.examples import Example, normal_form
from job.data.words import is_character, split_words

WORDS = 13
_MIN_WORDS = 5
_CHARACTERS_PER_WORD = 2
_MAX_PAIRS = 100


class Passages:
    """The passages of questions, for searching texts."""

    def __init__(self, questions: Mapping[str, str]) -> None:
        """Index the texts of questions, by id."""
        self._passages: dict[tuple[str, ...], list[tuple[tuple[str, ...], str]]] = {}
        """Passages with the id of their question, by their first words."""
        self.too_short = 0
        for identity, question in questions.items():
            words = tuple(split_words(question.casefold()))
            scale = _CHARACTERS_PER_WORD if 2 * sum(map(is_character, words)) > len(words) else 1
            if len(words) < scale * _MIN_WORDS:
                self.too_short += 1
                continue
            size = min(scale * WORDS, len(words))
            for at in range(len(words) - size + 1):
                known = self._passages.setdefault(words[at : at + _MIN_WORDS], [])
                known.append((words[at : at + size], identity))

    def search(self, text: str) -> Iterator[tuple[str, str]]:
        """Yield the id of each question that shares a passage with a text, and the passage."""
        words = tuple(split_words(text.casefold()))
        seen: set[str] = set()
        for at in range(len(words) - _MIN_WORDS + 1):
            for passage, question in self._passages.get(words[at : at + _MIN_WORDS], ()):
                if question not in seen and words[at : at + len(passage)] == passage:
                    seen.add(question)
                    yield question, " ".join(passage)


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
    questions: Mapping[str, Mapping[str, str]],
    prompts: Mapping[str, Sequence[str]],
    examples: Iterable[Example],
) -> Contamination:
    """Search the examples for the questions and the prompts of every task.

    Args:
        questions: for each task, the texts of its questions by id.
        prompts: for each task with free answers, its prompts; one that is trained on is the same
            but for case and punctuation.
        examples: the training examples.
    """
    passages = {task: Passages(texts) for task, texts in questions.items()}
    matched: dict[str, set[str]] = {task: set() for task in questions}
    pairs: list[Pair] = []
    forms = {task: [normal_form(text.encode()) for text in each] for task, each in prompts.items()}
    searched = set().union(*forms.values())
    trained: set[bytes] = set()
    count = 0
    for example in examples:
        count += 1
        if searched:
            users = (message.content for message in example.turns if message.role == "user")
            trained |= searched & {normal_form(text.encode()) for text in users}
        for task in questions:
            for question, passage in passages[task].search(example.text):
                matched[task].add(question)
                if len(pairs) < _MAX_PAIRS:
                    pairs.append(
                        Pair(eval=task, question=question, example=example.id, passage=passage)
                    )
    overlaps = {
        task: Overlap(
            questions=len(texts), too_short=passages[task].too_short, found=len(matched[task])
        )
        for task, texts in questions.items()
    }
    return Contamination(
        words=WORDS,
        examples=count,
        slices=overlaps,
        pairs=pairs,
        trained_prompts={task: sum(f in trained for f in each) for task, each in forms.items()},
    )


def clean_rows(
    questions: Iterable[str], staged: StagedDataset, check_stop: Callable[[], None]
) -> np.ndarray:
    """Return which staged examples share no passage with a question: bool `[examples]`.

    Args:
        questions: texts of the questions.
        staged: the examples.
        check_stop: called before each batch; it may raise.
    """
    passages = Passages({text: text for text in questions})
    clean = np.ones(staged.manifest.rows, bool)
    for first, batch in staged.batches(COLUMNS.names):
        check_stop()
        for number, row in enumerate(batch.to_pylist(), first):
            text = example_from_columns("", **row).text
            clean[number] = not any(passages.search(text))
    return clean
