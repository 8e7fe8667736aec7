"""The block-wise step equals the step as one program, for every family of models and mesh."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import keras_hub
import numpy as np
import pytest

from job.data.packing import PackedRows, make_rows
from job.model.decoder_blocks import split_into_blocks
from job.model.language_model import ForwardConfig, LanguageModel
from job.model.lora import flatten_lora
from job.spec.schema import Train
from job.train.blockwise_step import BlockwiseStep, make_step
from job.train.optimizer import make_optimizer
from job.train.step import StepConfig, padded_loss_count, shard_input
from tests.conversations import most_losses
from tests.model.families import BY_FAMILY
from tests.train.small import (
    ALL_LINEAR,
    ATTENTION,
    make_state,
    make_trainer,
    perturbed_lora,
    random_examples,
    small_model,
)

SGD = Train(optimizer="sgd", learning_rate=1.0, schedule="constant", warmup_ratio=0)


def run_step(
    model: LanguageModel, rows: PackedRows, config: StepConfig, mode: Any, micro_batches: int = 1
) -> tuple[list[np.ndarray], Any, Any]:
    """The LoRA weights after a step, its metrics, and a validation before it."""
    lora = perturbed_lora(model)
    optimizer, _ = make_optimizer(SGD, 1, lora)
    step, validate = make_step(model, optimizer, config, mode)
    assert isinstance(step, BlockwiseStep) == (mode == "blocks")
    state = make_state(model, optimizer, lora)
    batch = rows.batch.take(np.arange(8 * micro_batches) % len(rows.batch))
    losses = padded_loss_count(most_losses(batch, micro_batches * model.devices))
    first = rows.batch.take(np.arange(8) % len(rows.batch))
    sums = validate(state.lora, model.weights, shard_input(model, first, 1, losses))
    inputs = shard_input(model, batch, micro_batches, losses)
    state, metrics = step(state, model.weights, inputs)
    return [np.asarray(a) for a in flatten_lora(state.lora)], metrics, sums


def assert_same(ours: Any, theirs: Any) -> None:
    """Check the weights, the metrics and the validation."""
    assert any(np.abs(np.asarray(a)).max() > 1e-3 for a in ours[0])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "packed"),
    [
        *(
            pytest.param(family, False, marks=pytest.mark.slow)
            for family in ("LlamaBackbone", "MistralBackbone")
        ),
        *(
            pytest.param(
                *p.values, True, marks=() if p.values == ("LlamaBackbone",) else pytest.mark.slow
            )
            for p in BY_FAMILY
        ),
    ],
)
def test_block_programs_equal_the_single_program(family: str, packed: bool) -> None:
    # As one program, the feed-forward half of the last block sees, and drops, fewer positions: with
    # adapters there, dropout differs.
    targets, dropout = (ALL_LINEAR, 0.0) if family == "Gemma3Backbone" else (ATTENTION, 0.5)
    model = small_model(family, targets)
    # Longer than the sliding window of 5 tokens, so that local blocks differ from global ones.
    rows = make_rows(random_examples(), 14, packing=packed)
    config = StepConfig(ForwardConfig(packed, longest=rows.longest), dropout=dropout, seed=3)
    theirs = run_step(model, rows, config, "step", micro_batches=2)
    if family == "Qwen3Backbone":
        config = config._replace(forward=config.forward._replace(remat="blocks"))
    assert_same(run_step(model, rows, config, "blocks", micro_batches=2), theirs)


@pytest.mark.parametrize(("longest", "kinds"), [(5, 1), (6, 2), (None, 2)])
def test_an_unfilled_window_makes_no_kind_of_its_own(longest: int | None, kinds: int) -> None:
    model = small_model("Gemma3Backbone")
    blocks = split_into_blocks(model, ForwardConfig(packed=True, longest=longest))
    assert blocks is not None
    assert len(set(blocks.kinds)) == kinds


@pytest.mark.slow
def test_identical_blocks_have_their_own_wavelengths() -> None:
    """Gemma 3's global blocks rotate a hundred times slower; one program must do both."""
    model = small_model("Gemma3Backbone", ATTENTION, sliding_window_size=32)
    rows = make_rows(random_examples(longest=30), 30, packing=True)
    config = StepConfig(ForwardConfig(packed=True, longest=rows.longest))
    blocks = split_into_blocks(model, config.forward)
    assert blocks is not None
    assert len(set(blocks.kinds)) == 1
    arrays = blocks.arrays(model.weights, perturbed_lora(model))
    assert [float(block.rotary[0, 0]) for block in arrays] == [10_000] * 5 + [1_000_000]
    assert_same(run_step(model, rows, config, "blocks"), run_step(model, rows, config, "step"))


@pytest.mark.slow
def test_block_programs_on_a_mesh_equal_those_on_one_device() -> None:
    rows = make_rows(random_examples(), 14, packing=True)
    config = StepConfig(ForwardConfig(packed=True, longest=rows.longest))
    shape = {"num_query_heads": 4, "num_key_value_heads": 4}
    one_device = run_step(small_model("LlamaBackbone", ATTENTION, **shape), rows, config, "blocks")
    for mesh in ((8, 1), (2, 4)):
        model = small_model("LlamaBackbone", ATTENTION, mesh=mesh, **shape)
        assert_same(run_step(model, rows, config, "blocks"), one_device)


@pytest.mark.parametrize("reason", ["remat", "gpt2"])
def test_some_models_are_not_split_into_blocks(reason: str) -> None:
    forward = ForwardConfig(packed=True, remat="none" if reason == "remat" else "matmuls")
    model = small_model("LlamaBackbone")
    if reason == "gpt2":
        model.backbone = keras_hub.models.GPT2Backbone(
            vocabulary_size=64, num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=32,
            max_sequence_length=32, dtype="float32",
        )  # fmt: skip
    assert split_into_blocks(model, forward) is None


def test_a_cpu_has_one_program_by_default(tmp_path: Path, small: LanguageModel) -> None:
    assert not isinstance(
        make_trainer(tmp_path, small, compile="auto")[0].train_step, BlockwiseStep
    )
    assert isinstance(make_trainer(tmp_path, small)[0].train_step, BlockwiseStep)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect the names of the functions that are compiled in the block."""
    names: list[str] = []

    def on_event(event: str, _: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(on_event)
    yield names
    jax.monitoring.unregister_event_duration_listener(on_event)


class Planned(NamedTuple):
    """A step whose programs are compiled, and what it takes."""

    step: Any
    validate: Any
    optimizer: Any
    batch: Any


@pytest.fixture(scope="module")
def planned(small: LanguageModel) -> Planned:
    """A step whose programs are compiled as `job plan` compiles them."""
    rows = make_rows(random_examples(), 14, packing=True)
    optimizer, _ = make_optimizer(Train(), 1, perturbed_lora(small))
    config = StepConfig(ForwardConfig(packed=True, longest=14), dropout=0.5)
    step, validate = make_step(small, optimizer, config, "blocks")
    losses = padded_loss_count(most_losses(rows.batch, 1))
    batch = shard_input(small, rows.batch, 1, losses)
    state = make_state(small, optimizer, perturbed_lora(small))
    with compilations() as names:
        for program in step.block_programs(state, small.weights, batch):
            program.function.lower(*program.arguments).compile()
    assert len(names) >= 5
    return Planned(step, validate, optimizer, batch)


def test_steps_and_validations_use_the_planned_programs(
    small: LanguageModel, planned: Planned
) -> None:
    state = make_state(small, planned.optimizer, perturbed_lora(small))
    with compilations() as names:
        for _ in range(2):
            state, _ = planned.step(state, small.weights, planned.batch)
        planned.validate(state.lora, small.weights, planned.batch)
    assert names == []


def test_a_step_that_is_not_finite_changes_nothing(small: LanguageModel, planned: Planned) -> None:
    lora = perturbed_lora(small)
    broken: Any = ((np.full_like(lora[0][0], np.nan), lora[0][1]), *lora[1:])
    state = make_state(small, planned.optimizer, broken)
    state, metrics = planned.step(state, small.weights, planned.batch)
    assert not np.isfinite(metrics.loss)
    for ours, theirs in zip(flatten_lora(state.lora), flatten_lora(broken), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_step_out_of_memory_leaves_no_arrays_behind(tmp_path: Path, small: LanguageModel) -> None:
    trainer, _ = make_trainer(tmp_path, small, epochs=1)
    programs: dict[int, Any] = trainer.train_step.backward
    run, load = programs[0], trainer.batches.load
    calls, live_bytes = 0, []

    def out_of_memory(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: a test")
        return run(*args)

    def measuring(step: int, **options: Any) -> Any:
        if step == 0:
            live_bytes.append(sum(array.nbytes for array in jax.live_arrays()))
        return load(step, **options)

    programs[0], trainer.batches.load = out_of_memory, measuring  # type: ignore[method-assign]
    gc.collect()
    gc.disable()
    try:
        trainer.run()
    finally:
        gc.enable()
    before, after = live_bytes
    assert after - before < 1_000
