"""A model of two small blocks, one local and one global, that compiles quickly; its trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
from jax.sharding import Mesh

from job.data.packing import TokenExample, make_rows
from job.machine.distributed import CoordinatedStop, ProcessGroup
from job.model.language_model import LanguageModel, Preset
from job.model.lora import LoraWeights
from job.runtime.signals import StopSignal
from job.spec.schema import Lora, Model, Train
from job.storage.base import Store
from job.storage.local import LocalStore
from job.train.checkpoint import CHECKPOINTS, Checkpoints
from job.train.state import TrainState
from job.train.trainer import TrainData, Trainer, TrainerConfig
from tests.conversations import token_example
from tests.model.families import small_backbone

VOCABULARY = 64
ALL_LINEAR = Lora(rank=2, alpha=4, targets="all-linear")
ATTENTION = Lora(rank=2, alpha=4, targets=["query", "value"])
TWO_MATRICES = Lora(rank=2, alpha=4, targets=["value", "ffw_linear"])
"""Learns almost as fast as ALL_LINEAR, and compiles in half the time."""


class Codec:
    """Tests train on numbers, so no tokenizer is needed."""

    stop_ids = (1,)
    pad_id = 0


class Task:
    """A backbone as a KerasHub task holds it."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone


def small_model(
    family: str = "GemmaBackbone",
    lora: Lora = ALL_LINEAR,
    mesh: tuple[int, int] = (1, 1),
    **arguments: Any,
) -> LanguageModel:
    """A small random model; the mesh is (data, model)."""
    keras.utils.set_random_seed(0)
    devices = np.array(jax.devices()[: mesh[0] * mesh[1]]).reshape(mesh)
    config = Model(preset="tiny", dtype="float32", lora=lora)
    task, codec = Task(small_backbone(family, **arguments)), Codec()
    return LanguageModel(
        task, codec, config, Preset("tiny", None), Mesh(devices, ("data", "model"))
    )  # type: ignore[arg-type]


def random_examples(count: int = 12, longest: int = 14) -> list[TokenExample]:
    """Random tokens of many lengths, the longest first; most exceed the window of 5."""
    generator = np.random.default_rng(5)
    lengths = [longest, *generator.integers(4, longest, size=count - 1)]
    return [
        token_example(
            str(number),
            generator.integers(5, VOCABULARY, size=length).tolist(),
            int(generator.integers(1, length - 1)),
        )
        for number, length in enumerate(lengths)
    ]


def learnable_examples(count: int = 16) -> list[TokenExample]:
    """Random prompts of 4 tokens, and a response that all have in common."""
    generator = np.random.default_rng(6)
    prompts = generator.integers(20, VOCABULARY, size=(count, 4)).tolist()
    return [token_example(str(n), [*prompt, *range(5, 13)], 4) for n, prompt in enumerate(prompts)]


def perturbed_lora(model: LanguageModel) -> LoraWeights:
    """LoRA weights that change the model, so that no gradient is zero."""
    generator = np.random.default_rng(2)
    return tuple(
        (np.asarray(a), generator.normal(0, 0.3, b.shape).astype(np.float32))
        for a, b in model.lora.init(0)
    )


def make_state(model: LanguageModel, optimizer: Any, lora: LoraWeights) -> TrainState:
    """The state before the first step, on the devices, in memory of its own."""
    variables = tuple(np.array(variable.value) for variable in optimizer.variables)
    state: TrainState = model.replicate(TrainState(jax.tree.map(np.array, lora), variables))
    return state


def make_trainer(
    folder: Path,
    model: LanguageModel,
    store: Store | None = None,
    lora: LoraWeights | None = None,
    **train: object,
) -> tuple[Trainer, StopSignal]:
    """A trainer of 9 steps, in block programs, and what stops it."""
    settings = Train.model_validate(
        {"batch_size": 4, "learning_rate": 3e-2, "packing": False, "max_length": 16,
         "epochs": 3, "log_every": 1, "checkpoint_every": 5, "compile": "blocks"} | train
    )  # fmt: skip
    stop, examples = StopSignal(), learnable_examples()
    rows = make_rows(examples[:12], 16, packing=False)
    validation = make_rows(examples[12:], 16, packing=False)
    data = TrainData(rows, validation, model.lora.init(0) if lora is None else lora)
    config = TrainerConfig(settings, seed=0, packed=False, inputs_digest="inputs")
    coordinated = CoordinatedStop(stop, ProcessGroup())
    return Trainer(model, data, config, store or LocalStore(folder), coordinated), stop


def checkpoints_in(store: Store, inputs_digest: str = "inputs") -> Checkpoints:
    """The checkpoints of a trainer of `make_trainer`."""
    return Checkpoints(store, CHECKPOINTS, inputs_digest)


def before_step(trainer: Trainer, action: Callable[[int, Any], None]) -> None:
    """Call `action` with the number of the call, from 1, and the batch before each step."""
    step, calls = trainer.train_step, 0

    def wrapped(state: Any, weights: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        action(calls, batch)
        return step(state, weights, batch)

    trainer.train_step = wrapped
