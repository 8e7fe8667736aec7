"""Every row is used once an epoch, in a seeded order, with rows of similar lengths together."""

from pathlib import Path

import numpy as np
import pytest

from job.data.packing import make_rows
from job.model.language_model import ForwardConfig, LanguageModel
from job.spec.schema import Train
from job.train.batching import BatchLoader
from job.train.schedule import BatchSchedule
from job.train.step import make_validation
from tests.train.small import perturbed_lora, random_examples


def test_every_row_is_used_once_an_epoch_in_a_seeded_order() -> None:
    schedule = BatchSchedule(rows=10, batch_size=4, epochs=2, seed=3)
    assert schedule.steps == 6
    epochs = [
        np.concatenate([schedule.batch_indices(step) for step in steps])
        for steps in (range(3), range(3, 6))
    ]
    for indices in epochs:
        assert sorted(indices) == [-1, -1, *range(10)]
    assert epochs[0].tolist() != epochs[1].tolist()
    other = BatchSchedule(rows=10, batch_size=4, epochs=2, seed=4)
    assert schedule.batch_indices(0).tolist() != other.batch_indices(0).tolist()


def test_rows_of_similar_lengths_share_steps() -> None:
    lengths = tuple(int(n) for n in np.random.default_rng(0).integers(1, 5, 21) * 16)
    sorted_schedule = BatchSchedule(21, 4, 2, 0, lengths)
    for epoch in range(2):
        steps = range(epoch * 6, epoch * 6 + 6)
        indices = np.concatenate([sorted_schedule.batch_indices(step) for step in steps])
        assert sorted(indices[indices >= 0]) == list(range(21))

    def padded_tokens(schedule: BatchSchedule) -> int:
        steps = [schedule.batch_indices(step) for step in range(5)]
        return sum(max(lengths[row] for row in step) for step in steps)

    assert padded_tokens(sorted_schedule) < padded_tokens(BatchSchedule(21, 4, 2, 0))


def test_buckets_do_not_change_the_validation_loss(tmp_path: Path, small: LanguageModel) -> None:
    examples = random_examples(longest=30)
    plain = make_rows(examples, 32, packing=False)
    bucketed = make_rows(examples, 32, packing=False, buckets=[8, 16, 32])
    assert len(bucketed.buckets) > 1
    assert plain.fill < bucketed.fill <= 1
    validation_step, lora = (
        make_validation(small, ForwardConfig(packed=False)),
        perturbed_lora(small),
    )
    losses = []
    for rows in (plain, bucketed):
        schedule = BatchSchedule(len(rows.batch), 4, 1, 0, tuple(rows.lengths.tolist()))
        batches = BatchLoader(Train(batch_size=4), small, rows, schedule)
        losses.append(
            sum(
                float(validation_step(lora, small.weights, batch).loss)
                for batch in batches.load_validation(rows)
            )
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
