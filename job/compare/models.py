"""What `job compare` finds out: the JSON it prints, and what its table and page show."""

from dataclasses import dataclass, field
from typing import Any, Literal

from job.evals.predictions import ChoiceLine, DialogueLine
from job.results import Comparison, DialogueComparison, Record, Results


@dataclass(frozen=True)
class Finished:
    """A finished run that is compared: its results, and the tuned model's answers on file."""

    uri: str
    results: Results
    choices: dict[str, list[ChoiceLine]] = field(default_factory=dict)
    """By the name of the slice."""
    dialogues: list[DialogueLine] = field(default_factory=list)


class Figure(Record):
    """A row of the table of figures; one value a run, null where it has none."""

    name: str
    values: list[str | None]


class RunInfo(Record):
    """A run that is compared."""

    label: str
    uri: str
    id: str
    finished: str
    verdict: str


class Matched(Record):
    """How much of an evaluation two runs share."""

    only_a: int
    """What only the first was asked, or with another text."""
    only_b: int


class SliceTest(Matched):
    """The tuned models of two runs on the questions that both answered."""

    eval: str
    scoring: Literal["letters", "generate"]
    test: Comparison


class DialogueTest(Matched):
    """The same on held-out dialogues, by ROUGE-L."""

    test: DialogueComparison


class Compared(Record):
    """Runs side by side; each is tested against the first."""

    schema_version: Literal[1] = 1
    runs: list[RunInfo]
    figures: list[Figure]
    multiple_choice: list[SliceTest]
    dialogue: list[DialogueTest]
    settings: dict[str, list[Any]]
    """Values of the specs that differ, by their path; one a run, null where it is not set."""
    notes: list[str]
    """What was not compared, and why."""
