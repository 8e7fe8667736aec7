"""The step as a chain of programs is the step as one program, whatever the model and the mesh."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from job.data.packing import PackedRows, TokenExample, make_rows
from job.model.blocks import split_into_blocks
from job.model.language_model import ForwardConfig, LanguageModel, Preset
from job.model.lora import LoraWeights, flatten_lora
from job.spec.schema import Lora, Model, Train
from job.train.blockwise_step import BlockwiseStep, make_step
from job.train.optimizer import make_optimizer
from job.train.step import StepConfig, TrainState, padded_loss_count, shard_input
from tests.conftest import MakeModel
from tests.conversations import token_example
from tests.model.families import families_with, small_backbone
from tests.train.test_trainer import trainer


class Codec:
    """No tokenizer is needed: tokens are numbers here."""

    stop_ids = (1,)
    pad_id = 0


class Task:
    """A backbone as a task holds it."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone


def small_model(family: str, lora: Lora, **arguments: Any) -> LanguageModel:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    model = Model(preset="tiny", dtype="float32", lora=lora)
    task = Task(small_backbone(family, **arguments))
    return LanguageModel(task, Codec(), model, Preset("tiny", None), mesh)  # type: ignore[arg-type]


def make_examples(vocabulary: int, longest: int) -> list[TokenExample]:
    generator = np.random.default_rng(5)
    lengths = [longest, *generator.integers(4, longest, size=11)]
    return [
        token_example(str(number), generator.integers(5, vocabulary, size=length).tolist(), 2)
        for number, length in enumerate(lengths)
    ]


def start_of(model: LanguageModel) -> LoraWeights:
    """An adapter that changes the model, so that no gradient is zero."""
    generator = np.random.default_rng(2)
    return tuple(
        (np.asarray(a), generator.normal(0, 0.3, b.shape).astype(np.float32))
        for a, b in model.lora.init(0)
    )


def one_step(
    model: LanguageModel, rows: PackedRows, recipe: StepConfig, *, chained: bool, parts: int = 1
) -> tuple[list[np.ndarray], Any, Any]:
    """The adapter after a step, the step's figures, and a validation of the first adapter."""
    start = start_of(model)
    train = Train(optimizer="sgd", learning_rate=1.0, schedule="constant", warmup_ratio=0)
    optimizer, _ = make_optimizer(train, 1, start)
    step, validate = make_step(model, optimizer, recipe, "blocks" if chained else "step")
    assert isinstance(step, BlockwiseStep) == chained
    variables = tuple(np.array(v.value) for v in optimizer.variables)
    state = TrainState(*model.replicate((start, variables)))
    batch = rows.batch.take(np.arange(8 * parts) % len(rows.batch))
    width = padded_loss_count(int(batch.losses(parts * model.devices).max()))
    first = rows.batch.take(np.arange(8) % len(rows.batch))
    sums = validate(state.lora, model.weights, shard_input(model, first, 1, width))
    state, figures = step(state, model.weights, shard_input(model, batch, parts, width))
    return [np.asarray(a) for a in flatten_lora(state.lora)], figures, sums


def check_same(found: Any, expected: Any, atol: float = 2e-5) -> None:
    assert any(np.abs(np.asarray(a)).max() > 1e-3 for a in found[0])
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=1e-5)


LINEAR = Lora(rank=2, alpha=4, targets="all-linear")
ATTENTION = Lora(rank=2, alpha=4, targets=["query", "value"])


@pytest.mark.parametrize(
    ("family", "packed"),
    [("MistralBackbone", False), *((name, True) for name in families_with("blockwise"))],
)
def test_chain_equals_the_whole_step(family: str, packed: bool) -> None:
    model = small_model(family, LINEAR)
    # Longer than the sliding window of 5 tokens, so that local blocks differ from global ones.
    rows = make_rows(make_examples(64, 14), 14, packing=packed)
    recipe = StepConfig(ForwardConfig(packed, longest=rows.longest))
    check_same(
        one_step(model, rows, recipe, chained=True), one_step(model, rows, recipe, chained=False)
    )


@pytest.mark.parametrize(("reach", "kinds"), [(5, 1), (6, 2), (None, 2)])
def test_blocks_whose_window_no_token_fills_are_alike(reach: int | None, kinds: int) -> None:
    model = small_model("Gemma3Backbone", LINEAR)
    blocks = split_into_blocks(model, ForwardConfig(packed=True, longest=reach))
    assert blocks is not None
    assert len(set(blocks.kinds)) == kinds


def test_alike_blocks_keep_their_own_wavelengths() -> None:
    """Gemma 3's global blocks turn a hundred times slower; one program must do both."""
    model = small_model("Gemma3Backbone", LINEAR, sliding_window_size=32)
    rows = make_rows(make_examples(64, 30), 30, packing=True)
    recipe = StepConfig(ForwardConfig(packed=True, longest=rows.longest))
    blocks = split_into_blocks(model, recipe.forward)
    assert blocks is not None
    assert len(set(blocks.kinds)) == 1
    turns = [float(own.rotary[0, 0]) for own in blocks.arrays(model.weights, start_of(model))]
    assert turns == [10_000] * 5 + [1_000_000]
    check_same(
        one_step(model, rows, recipe, chained=True), one_step(model, rows, recipe, chained=False)
    )


@pytest.mark.parametrize(
    "recipe",
    [
        StepConfig(ForwardConfig(packed=True, remat="blocks", longest=14)),
        StepConfig(ForwardConfig(packed=True, longest=14), dropout=0.5, seed=3),
        StepConfig(
            ForwardConfig(packed=True, longest=14), label_smoothing=0.2, lora_plus_ratio=4.0
        ),
    ],
    ids=["blocks", "dropout", "smoothing and lora+"],
)
def test_chain_follows_the_recipe(recipe: StepConfig) -> None:
    # In the whole step the last block's feed-forward half sees, and drops, fewer positions.
    model = small_model("Qwen3Backbone", ATTENTION if recipe.dropout else LINEAR)
    rows = make_rows(make_examples(64, 14), 14, packing=True)
    found = one_step(model, rows, recipe, chained=True, parts=2)
    check_same(found, one_step(model, rows, recipe, chained=False, parts=2))
    plain = one_step(model, rows, StepConfig(recipe.forward), chained=True, parts=2)
    changed = [np.abs(a - b).max() for a, b in zip(found[0], plain[0], strict=True)]
    assert (max(changed) > 1e-3) == (recipe != StepConfig(recipe.forward))
    # What training does besides is no part of a validation.
    np.testing.assert_allclose(found[2], plain[2], rtol=1e-6)


@pytest.mark.parametrize(("data", "split"), [(8, 1), (2, 4)])
def test_chain_over_a_mesh_equals_the_step_on_one_device(
    make_model: MakeModel, tiny: LanguageModel, data: int, split: int
) -> None:
    rows = make_rows(make_examples(2000, 90), 128, packing=True)
    recipe = StepConfig(ForwardConfig(packed=True, longest=rows.longest))
    found = one_step(make_model(devices=data, split=split), rows, recipe, chained=True)
    check_same(found, one_step(tiny, rows, recipe, chained=True))


def test_a_step_that_is_not_finite_changes_nothing(tiny: LanguageModel) -> None:
    rows = make_rows(make_examples(2000, 90), 128, packing=True)
    start = start_of(tiny)
    broken: Any = ((np.full_like(start[0][0], np.nan), start[0][1]), *start[1:])
    optimizer, _ = make_optimizer(Train(), 1, start)
    step, _ = make_step(tiny, optimizer, StepConfig(ForwardConfig(packed=True)), "blocks")
    variables = tuple(np.array(v.value) for v in optimizer.variables)
    state = TrainState(*tiny.replicate((broken, variables)))
    width = padded_loss_count(int(rows.batch.losses(1).max()))
    state, figures = step(state, tiny.weights, shard_input(tiny, rows.batch, 1, width))
    assert not np.isfinite(figures.loss)
    for ours, theirs in zip(flatten_lora(state.lora), flatten_lora(broken), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("change", ["float16", "remat", "gpt2"])
def test_what_cannot_be_taken_apart_stays_whole(change: str) -> None:
    forward = ForwardConfig(packed=True, remat="none" if change == "remat" else "matmuls")
    model = small_model(
        "LlamaBackbone", LINEAR, dtype="float16" if change == "float16" else "float32"
    )
    if change == "gpt2":
        import keras_hub

        backbone = keras_hub.models.GPT2Backbone(
            vocabulary_size=64, num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=32,
            max_sequence_length=32, dtype="float32",
        )  # fmt: skip
        model.backbone = backbone
    assert split_into_blocks(model, forward) is None


def test_a_cpu_has_one_program_unless_told_otherwise(tmp_path: Path, tiny: LanguageModel) -> None:
    assert not isinstance(trainer(tmp_path, tiny, compile="auto")[0]._step, BlockwiseStep)
    assert isinstance(trainer(tmp_path, tiny)[0]._step, BlockwiseStep)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The names of the functions that are compiled from now on."""
    names: list[str] = []

    def on_event(event: str, _: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(on_event)
    yield names
    jax.monitoring.unregister_event_duration_listener(on_event)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_programs_are_compiled_once_and_ahead(
    tiny: LanguageModel, compiled: list[str], smoothing: float
) -> None:
    """Lowered from shapes alone; the steps and validations that follow find them."""
    rows = make_rows(make_examples(2000, 70), 96, packing=True)
    start = start_of(tiny)
    optimizer, _ = make_optimizer(Train(), 1, start)
    forward = ForwardConfig(packed=True, longest=rows.longest)
    recipe = StepConfig(forward, label_smoothing=smoothing)
    step, validate = make_step(tiny, optimizer, recipe, "blocks")
    variables = tuple(np.array(v.value) for v in optimizer.variables)
    state = TrainState(*tiny.replicate((start, variables)))
    width = padded_loss_count(int(rows.batch.losses(1).max()))
    batch = shard_input(tiny, rows.batch, 1, width)
    step.lower(state, tiny.weights, batch).compile()
    assert len(compiled) >= 5
    compiled.clear()
    for _ in range(2):
        state, _ = step(state, tiny.weights, batch)
    assert compiled == []
    validate(state.lora, tiny.weights, batch)
    assert [name for name in compiled if "_end" in name] == compiled
    assert len(compiled) == (1 if smoothing else 0)


def test_validations_of_a_training_find_the_programs_of_its_steps(
    tmp_path: Path, tiny: LanguageModel, compiled: list[str]
) -> None:
    made, _ = trainer(tmp_path, tiny, epochs=1, batch_size=12)  # and 4 rows to validate with
    made.trace_first()()
    compiled.clear()
    made.run()
    ours = ("begin", "forward", "end", "backward", "update")
    assert [name for name in compiled if any(one in name for one in ours)] == []


def test_what_a_step_held_that_did_not_fit_is_gone_when_the_next_begins(
    tmp_path: Path, tiny: LanguageModel
) -> None:
    made, _ = trainer(tmp_path, tiny, epochs=1)
    chain: Any = made._step
    (program,) = chain._passes.backward.values()
    run, begin = program.run, made._run_through
    calls, there = 0, []

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: a test")
        return run(*args)

    def begins() -> Any:
        there.append(sum(array.nbytes for array in jax.live_arrays()))
        return begin()

    program.run, made._run_through = full, begins
    gc.collect()
    gc.disable()
    try:
        made.run()
    finally:
        gc.enable()
    before, after = there
    assert after - before < 100_000
