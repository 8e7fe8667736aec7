"""The workload of a spec: rows, steps and tokens to train on, prompts to answer.

A spec does not say how many rows a dataset has or how long its examples are. Counts come from the
run's data stage if it is done; the rest is assumed, and every assumption is listed.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, computed_field

from job.results import DataInfo
from job.spec.evals import HELD_OUT
from job.spec.fields import SAMPLES
from job.spec.schema import Source, Spec

TOKENS = 210
"""Assumed tokens of an example, the mean of the shipped dialogues of a patient and a doctor."""

LOSS_SHARE = 0.45
"""Assumed share of an example's tokens in the response."""

FILL = 0.97
"""Assumed share of a packed row that holds tokens; short examples fill more."""

QUESTION_TOKENS = 192
"""Assumed tokens of a multiple-choice prompt."""

_ROWS = 1000
"""Assumed rows of a dataset of unknown size."""

_OPTIONS = 4
"""Assumed options of a sample of lm-evaluation-harness, each a prompt of its own."""

_DISCORDANT = 0.2
"""Assumed share of questions that only one of baseline and tuned model gets right."""

_KNOWN_ROWS = {
    ("hf://openlifescienceai/medmcqa", "validation"): 4183,
    ("hf://cais/mmlu", "test"): 14_042,
    ("hf://LibrAI/do-not-answer", "train"): 939,
    ("hf://LinhDuong/chatdoctor-200k", "train"): 207_408,
    (f"{SAMPLES}:dialogues", "train"): 170,
    (f"{SAMPLES}:questions", "train"): 64,
}


@dataclass(frozen=True)
class EvalWorkload:
    """Prompts of one evaluation, which run before and after training."""

    name: str
    scoring: Literal["letters", "generate"]
    prompts: int
    prompt_tokens: int
    new_tokens: int


class Workload(BaseModel):
    """Numbers of rows, steps, tokens and prompts of a job."""

    examples: int
    tokens_per_example: int
    row_length: int
    rows: int
    batch_size: int
    epochs: int
    loss_share: float
    """Share of a row's tokens, padding included, that have a loss."""
    validation_rows: int
    validations: int
    evaluations: list[EvalWorkload]
    evidence: list[str]
    """What the retention tasks can show."""
    assumptions: list[str]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return math.ceil(self.rows / self.batch_size) * self.epochs

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens(self) -> int:
        """Tokens trained on, without padding."""
        return self.examples * self.tokens_per_example * self.epochs

    @computed_field  # type: ignore[prop-decorator]
    @property
    def slots_a_step(self) -> int:
        """Tokens of a step, padding included, over all devices."""
        return self.batch_size * self.row_length


def workload(
    spec: Spec,
    data: DataInfo | None = None,
    examples: int | None = None,
    tokens: int | None = None,
) -> Workload:
    """Return the workload of a spec.

    Args:
        data: the result of the run's data stage, if it is done.
        examples: training examples, if the spec takes all of a dataset of unknown size.
        tokens: mean tokens per example.
    """
    assumptions: list[str] = []
    train = spec.train
    count = data.train if data else _examples(spec, examples, assumptions)
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
    evaluations = _evaluations(spec, assumptions)
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
        evaluations=evaluations,
        evidence=list(_evidence(spec, {each.name: each.prompts for each in evaluations})),
        assumptions=assumptions,
    )


def _examples(spec: Spec, given: int | None, assumptions: list[str]) -> int:
    if spec.data.train_examples != "all":
        return spec.data.train_examples
    if given is not None:
        return given
    rows = _rows_of(spec.data, "dialogues", assumptions)
    return max(1, rows - spec.data.validation_examples)


def _rows_of(source: Source, samples: str, assumptions: list[str]) -> int:
    """Return the rows of a dataset, assumed unless it is a text file or known."""
    name = f"{SAMPLES}:{samples}" if source.dataset == SAMPLES else source.dataset
    if (known := _KNOWN_ROWS.get((name, source.split))) is not None:
        return known
    path = Path(source.dataset)
    if path.suffix.lower() in (".jsonl", ".ndjson", ".csv") and path.is_file():
        with path.open("rb") as file:
            return max(1, sum(1 for line in file if line.strip()) - (path.suffix == ".csv"))
    assumptions.append(f"{source.dataset} has {_ROWS} rows (--examples, or a limit in the spec)")
    return _ROWS


def _evaluations(spec: Spec, assumptions: list[str]) -> list[EvalWorkload]:
    evaluations: list[EvalWorkload] = []
    for entry in spec.evals.multiple_choice:
        count = entry.limit or _rows_of(entry, "questions", assumptions)
        new = entry.max_new_tokens if entry.scoring == "generate" else 0
        evaluations.append(EvalWorkload(entry.name, entry.scoring, count, QUESTION_TOKENS, new))
    held_out, prompt = spec.data.validation_examples, int(TOKENS * (1 - LOSS_SHARE))
    for harness in spec.evals.harness:
        count = harness.limit or _ROWS
        assumptions.append(
            f"{harness.task} is one task of {count:,} samples with {_OPTIONS} options"
        )
        tokens = _OPTIONS * QUESTION_TOKENS
        evaluations.append(EvalWorkload(harness.name, "letters", count, tokens, 0))
    for task in spec.evals.tasks:
        count = min(task.limit or held_out, held_out)
        if task.dataset != HELD_OUT:
            count = task.limit or _rows_of(task, "dialogues", assumptions)
        evaluations.append(EvalWorkload(task.name, "generate", count, prompt, task.max_new_tokens))
    if (dialogue := spec.evals.dialogue) is not None:
        count, new = min(dialogue.max_examples, held_out), dialogue.max_new_tokens
        evaluations.append(EvalWorkload("dialogue", "generate", count, prompt, new))
    side = spec.evals.side_by_side
    if count := min(side.max_examples, held_out) + len(side.prompts):
        new = side.max_new_tokens
        evaluations.append(EvalWorkload("side by side", "generate", count, prompt, new))
    return evaluations


def _evidence(spec: Spec, prompts: Mapping[str, int]) -> Iterator[str]:
    """Yield what each retention task can show with its number of questions."""
    evals = spec.evals
    for entry in (*evals.multiple_choice, *evals.harness, *evals.tasks):
        if entry.role == "retention":
            from job.evals.statistics import power_of_retention, questions_for_retention

            questions = prompts[entry.name]
            power = power_of_retention(questions, _DISCORDANT, entry.margin)
            points = f"{100 * entry.margin:g} point{'' if entry.margin == 0.01 else 's'}"
            needed = questions_for_retention(_DISCORDANT, entry.margin)
            yield (
                f"{entry.name}: {questions:,} questions exclude a loss of {points} "
                f"with a probability of {power:.0%}, {needed:,} with 80%, if nothing is "
                f"lost and {_DISCORDANT:.0%} of the questions change sides"
            )
