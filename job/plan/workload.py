"""How much work a spec asks for: rows, steps and tokens to train on, prompts to answer.

A spec does not say how many rows a dataset has nor how long its examples are. What the run's own
data stage found is taken where it is done; the rest is assumed, and every assumption is said.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from job.results import DataInfo
from job.spec.fields import SAMPLES
from job.spec.schema import MultipleChoiceEval, Source, Spec

TOKENS = 210
"""Tokens of an example: what dialogues of a patient and a doctor have on average."""


LOSS_SHARE = 0.45
"""Share of them in the response."""


FILL = 0.97
"""Share of a packed row's slots that hold a token; best fit reaches more where examples are
short."""


QUESTION_TOKENS = 192


DIALOGUES = 200


SIDE_BY_SIDE = 4


_ROWS = 1000


_KNOWN_ROWS = {
    ("hf://openlifescienceai/medmcqa", "validation"): 4183,
    ("hf://LinhDuong/chatdoctor-200k", "train"): 207_408,
    (f"{SAMPLES}:dialogues", "train"): 170,
    (f"{SAMPLES}:questions", "train"): 64,
}


@dataclass(frozen=True)
class EvalWorkload:
    """Prompts through the model, before and after training."""

    name: str
    scoring: Literal["letters", "generate"]
    prompts: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    """What the job does, in numbers."""

    examples: int
    tokens_per_example: int
    row_length: int
    rows: int
    batch_size: int
    epochs: int
    loss_share: float
    """Share of the slots of a row that have a loss."""
    validation_rows: int
    validations: int
    evaluations: tuple[EvalWorkload, ...]
    assumptions: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.rows / self.batch_size) * self.epochs

    @property
    def tokens(self) -> int:
        """Tokens trained on, padding not counted."""
        return self.examples * self.tokens_per_example * self.epochs

    @property
    def slots(self) -> int:
        """Token places that go through the model in training."""
        return self.steps * self.batch_size * self.row_length

    @property
    def slots_a_step(self) -> int:
        """Token places of a step, over all devices."""
        return self.batch_size * self.row_length


def workload(
    spec: Spec,
    found: DataInfo | None = None,
    examples: int | None = None,
    tokens: int | None = None,
) -> Workload:
    """The work of a spec.

    Args:
        found: what the run's data stage found, if it is done.
        examples: training examples, where the spec takes all of a dataset of unknown size.
        tokens: mean tokens of an example.
    """
    assumptions: list[str] = []
    train = spec.train
    count = found.train if found else _examples(spec, examples, assumptions)
    if tokens is None:
        assumptions.append(
            f"an example has {min(TOKENS, train.max_length)} tokens, {LOSS_SHARE:.0%} of them in "
            "the response (--tokens)"
        )
    mean = min(tokens or TOKENS, train.max_length)
    length = train.row_length
    held_out = spec.data.validation_examples
    if train.packing:
        filled = length * FILL if mean < length else length
        rows, validation_rows = (math.ceil(n * mean / filled) for n in (count, held_out))
    else:
        rows, validation_rows = count, held_out
    fill = min(1.0, count * mean / (rows * length))
    share = LOSS_SHARE if train.loss_on == "response" else 1.0
    steps = math.ceil(rows / train.batch_size) * train.epochs
    every = train.validate_every
    return Workload(
        examples=count,
        tokens_per_example=mean,
        row_length=length,
        rows=rows,
        batch_size=train.batch_size,
        epochs=train.epochs,
        loss_share=share * fill,
        validation_rows=validation_rows,
        validations=1
        + (steps // every if every else 0)
        + (0 if every and not steps % every else 1),
        evaluations=tuple(_evaluations(spec, assumptions)),
        assumptions=tuple(assumptions),
    )


def _examples(spec: Spec, given: int | None, assumptions: list[str]) -> int:
    wanted = spec.data.train_examples
    if wanted != "all":
        return wanted
    if given is not None:
        return given
    rows = _rows_of(spec.data, "dialogues", assumptions)
    return max(1, rows - spec.data.validation_examples)


def _rows_of(source: Source, samples: str, assumptions: list[str]) -> int:
    """The rows of a dataset, as far as can be told without reading it."""
    name = f"{SAMPLES}:{samples}" if source.dataset == SAMPLES else source.dataset
    if (known := _KNOWN_ROWS.get((name, source.split))) is not None:
        return known
    path = Path(source.dataset)
    if path.suffix.lower() in (".jsonl", ".ndjson", ".csv") and path.is_file():
        with path.open("rb") as file:
            return max(1, sum(1 for line in file if line.strip()) - (path.suffix == ".csv"))
    assumptions.append(f"{source.dataset} has {_ROWS} rows (--examples, or a limit, says how many)")
    return _ROWS


def _evaluations(spec: Spec, assumptions: list[str]) -> Sequence[EvalWorkload]:
    found = [_questions(entry, assumptions) for entry in spec.evals.multiple_choice]
    prompt = int(TOKENS * (1 - LOSS_SHARE))
    if spec.evals.dialogue is not None:
        wanted = spec.evals.dialogue.examples
        prompts = min(wanted or DIALOGUES, spec.data.validation_examples)
        new = spec.evals.dialogue.max_new_tokens
        found.append(EvalWorkload("dialogue", "generate", prompts, prompt, new))
    side = spec.evals.side_by_side
    shown = SIDE_BY_SIDE if side.examples is None else side.examples
    shown = min(shown, spec.data.validation_examples) + len(side.prompts)
    if shown:
        found.append(EvalWorkload("side by side", "generate", shown, prompt, side.max_new_tokens))
    return found


def _questions(entry: MultipleChoiceEval, assumptions: list[str]) -> EvalWorkload:
    prompts = entry.limit or _rows_of(entry, "questions", assumptions)
    new = entry.max_new_tokens if entry.scoring == "generate" else 0
    return EvalWorkload(entry.name, entry.scoring, prompts, QUESTION_TOKENS, new)
