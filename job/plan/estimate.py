"""What a spec costs on a machine, by arithmetic alone: memory, FLOPs, seconds, USD.

FLOPs follow Kaplan et al. 2020 (2 a parameter and token forward, 2 for the gradient of the
activations; frozen kernels need no gradient of their own). Seconds are FLOPs at a stated share of
the peak, or the bytes that must be read where these take longer. Memory is counted part by part;
the shares that the compiler adds were fitted to what the TPU compiler reports, and a test
compares them with it.
"""

import math
from dataclasses import dataclass, replace

from job.machine.accelerators import Machine
from job.plan.model_shape import Layer, ModelShape
from job.plan.workload import EvalWorkload, Workload
from job.spec.schema import Spec

MFU = 0.4
"""Share of the peak that is assumed."""


_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


_CHUNK = 128
"""Queries that share their keys (`job.model.attention.ACCELERATOR`)."""


_SLICE = 2**30
"""Bytes of logits held at once (`job.train.loss.SLICE_BYTES`)."""


_WORKING = 0.4
"""Share of what a block's backward pass works with that is there at a time."""


_OPTIMIZER_COPIES = {"sgd": 0.0, "adamw": 2.0, "lion": 1.0, "adafactor": 0.1, "muon": 1.0}
"""Float32 numbers that an optimizer keeps for a trained one."""


_USABLE = 0.95
"""Share of a device's memory that is counted on."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device while training, by part."""

    weights: int
    adapter: int
    """With its gradient."""
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Layout:
    """How a machine is used: the mesh, and the rows that a device holds at once."""

    data: int
    model: int
    rows: int
    """Rows of a step on each part of the batch."""
    micro: int
    """Of them at once; the rest is accumulated."""


@dataclass(frozen=True)
class MachineEstimate:
    """One spec on one machine."""

    machine: Machine
    layout: Layout
    work: Workload
    """With a batch that the machine can share out."""
    memory: Memory
    fits: bool | None
    """None where the memory of the machine is not known."""
    flops_a_step: float
    """Over all devices."""
    step_seconds: float | None
    stage_seconds: dict[str, float] | None
    """Of the stages that use the devices; None where the machine's speed is not known."""
    advice: tuple[str, ...]
    """What to change where it does not fit."""

    @property
    def seconds(self) -> float | None:
        """Of all stages that use the devices."""
        return None if self.stage_seconds is None else sum(self.stage_seconds.values())


@dataclass(frozen=True)
class _Numbers:
    """Numbers of a token: those that each device has whole, and those split with the kernels."""

    whole: int = 0
    split: int = 0

    def __add__(self, other: "_Numbers") -> "_Numbers":
        return _Numbers(self.whole + other.whole, self.split + other.split)

    def on_device(self, model: int) -> float:
        """Of a model over so many devices, those on each."""
        return self.whole + self.split / model


def _kept(shape: ModelShape, spec: Spec) -> _Numbers:
    """What is kept of a token for the backward pass."""
    numbers = _Numbers()
    for layer in shape.layers:
        numbers += _Numbers(whole=shape.hidden)
        if spec.train.remat == "blocks":
            continue
        numbers += _results(layer, shape.hidden)
        if spec.train.remat == "none":
            numbers += _elementwise(layer, shape.hidden, spec)
    return numbers


def _results(layer: Layer, hidden: int) -> _Numbers:
    """What kernels give, with what the adapters beside them add."""
    numbers = _Numbers(split=layer.expert_outputs)
    for linear in layer.linears.values():
        # What is as wide as the model is summed over the devices, and whole on each.
        wide = linear.output == hidden
        numbers += _Numbers(linear.output, 0) if wide else _Numbers(0, linear.output)
    return numbers


def _elementwise(layer: Layer, hidden: int, spec: Spec) -> _Numbers:
    """What a block without rematerialization keeps besides results of kernels."""
    feed = max(linear.output for linear in layer.linears.values())
    keys = keys_seen(layer, spec.train.row_length, spec.train.max_length)
    experts = layer.expert_outputs // 2 + layer.expert_sums
    heads = layer.heads * (4 * layer.head_dim + 3 * keys)
    return _Numbers(8 * hidden, experts + 3 * feed + heads)


def _one_block(layer: Layer, hidden: int, spec: Spec) -> _Numbers:
    """What the backward pass of a block works with."""
    results = _results(layer, hidden)
    return _Numbers(whole=2 * hidden) + results + _elementwise(layer, hidden, spec)


def memory(shape: ModelShape, spec: Spec, layout: Layout, loss_share: float) -> Memory:
    """Bytes on each device of a training step."""
    size = _BYTES[spec.model.dtype]
    adapter = shape.adapter(spec.model.lora)
    tokens = layout.micro * spec.train.row_length
    blocks = (_one_block(layer, shape.hidden, spec) for layer in shape.layers)
    block = max(numbers.on_device(layout.model) for numbers in blocks)
    kept = _kept(shape, spec).on_device(layout.model)
    losses = math.ceil(tokens * loss_share)
    return Memory(
        weights=math.ceil(shape.parameters * size / layout.model),
        adapter=2 * 4 * adapter,
        optimizer=math.ceil(4 * _OPTIMIZER_COPIES[spec.train.optimizer] * adapter),
        activations=math.ceil(tokens * size * (kept + _WORKING * block)),
        logits=min(_SLICE, size * losses * shape.vocabulary),
    )


def keys_seen(layer: Layer, length: int, reach: int) -> int:
    """Keys that each query of a row of `length` is scored against, where none sees further than
    `reach` tokens (see `job.model.attention`)."""
    reach = min(reach, layer.window or reach)
    keys = math.ceil((reach - 1) / _CHUNK) * _CHUNK + _CHUNK
    return keys if 2 * keys <= length else length


def attention_flops(shape: ModelShape, length: int, reach: int) -> float:
    """FLOPs of a token's scores and sums over values, in all blocks, forward."""
    return sum(
        4.0 * layer.heads * layer.head_dim * keys_seen(layer, length, reach)
        for layer in shape.layers
    )


def step_flops(shape: ModelShape, spec: Spec, work: Workload) -> float:
    """FLOPs of an optimizer step, over all devices."""
    attention = attention_flops(shape, work.row_length, spec.train.max_length)
    again = {"none": 0.0, "matmuls": attention, "blocks": attention + 2.0 * shape.kernels}
    token = 4.0 * shape.kernels + 3.0 * attention + again[spec.train.remat]
    token += 6.0 * shape.adapter(spec.model.lora) + 4.0 * shape.head * work.loss_share
    return token * work.slots_a_step


def estimate(
    shape: ModelShape, spec: Spec, work: Workload, machine: Machine, mfu: float = MFU
) -> MachineEstimate:
    """The spec on a machine; its mesh is the spec's, as far as the machine has the chips."""
    layout, work, advice = _layout(shape, spec, work, machine)
    need = memory(shape, spec, layout, work.loss_share)
    limit = machine.accelerator.hbm_bytes
    fits = None if limit is None else need.total <= _USABLE * limit
    if fits is False:
        advice += _ways_out(shape, spec, work, machine, layout)
    flops = step_flops(shape, spec, work)
    step = _step_seconds(shape, spec, layout, machine, flops, mfu)
    stages = None
    if step is not None:
        # A validation is the forward half of its rows: less than half of what they cost trained.
        rows = math.ceil(work.validation_rows / layout.data) * layout.data
        validating = work.validations * rows * step / work.batch_size / 2
        asked = sum(
            evaluation_seconds(shape, spec, e, layout, machine, mfu) for e in work.evaluations
        )
        stages = {"baseline": asked, "train": work.steps * step + validating, "finetuned": asked}
    return MachineEstimate(machine, layout, work, need, fits, flops, step, stages, advice)


def _layout(
    shape: ModelShape, spec: Spec, work: Workload, machine: Machine
) -> tuple[Layout, Workload, tuple[str, ...]]:
    mesh, chips = spec.runtime.mesh, machine.chips
    model = min(mesh.model, chips)
    data = max(1, chips // model) if mesh.data == "auto" else mesh.data
    advice: list[str] = []
    if data * model > chips:
        data = max(1, chips // model)
        advice.append(f"runtime.mesh.data {data}")
    if work.batch_size % data:
        batch = math.ceil(work.batch_size / data) * data
        work = replace(work, batch_size=batch)
        advice.append(f"train.batch_size {batch}")
    rows = work.batch_size // data
    micro, limit = rows, machine.accelerator.hbm_bytes
    if spec.train.micro_batch != "auto":
        micro = math.gcd(spec.train.micro_batch, rows)
    elif limit is not None:
        micro = largest_micro(shape, spec, Layout(data, model, rows, rows), work, limit)
    return Layout(data, model, rows, micro), work, tuple(advice)


def largest_micro(shape: ModelShape, spec: Spec, layout: Layout, work: Workload, limit: int) -> int:
    """The most rows at once, a divisor of a device's rows, that fit; 1 where none does."""
    for micro in (n for n in range(layout.rows, 0, -1) if layout.rows % n == 0):
        trial = Layout(layout.data, layout.model, layout.rows, micro)
        if memory(shape, spec, trial, work.loss_share).total <= _USABLE * limit:
            return micro
    return 1


def _ways_out(
    shape: ModelShape, spec: Spec, work: Workload, machine: Machine, layout: Layout
) -> tuple[str, ...]:
    limit = _USABLE * (machine.accelerator.hbm_bytes or 0)
    if spec.train.micro_batch != "auto" and layout.micro > 1:
        least = Layout(layout.data, layout.model, layout.rows, 1)
        if memory(shape, spec, least, work.loss_share).total <= limit:
            return ("train.micro_batch auto",)
    ways = []
    less = spec.model_copy(update={"train": spec.train.model_copy(update={"remat": "blocks"})})
    if memory(shape, less, layout, work.loss_share).total <= limit:
        ways.append("train.remat blocks")
    model = layout.model * 2
    while model <= machine.chips:
        data = max(1, machine.chips // model)
        split = Layout(data, model, math.ceil(work.batch_size / data), 1)
        if memory(shape, spec, split, work.loss_share).total <= limit:
            ways.append(f"runtime.mesh.model {model}")
            break
        model *= 2
    return tuple(ways) or ("a machine with more memory or more chips",)


def _step_seconds(
    shape: ModelShape,
    spec: Spec,
    layout: Layout,
    machine: Machine,
    flops: float,
    mfu: float,
) -> float | None:
    kind = machine.accelerator
    if kind.peak_flops is None or kind.hbm_bandwidth is None:
        return None
    used = layout.data * layout.model
    passes = layout.rows // layout.micro
    weights = shape.parameters * _BYTES[spec.model.dtype] / layout.model
    busy = max(flops / used / kind.peak_flops / mfu, 2 * passes * weights / kind.hbm_bandwidth)
    return busy + _moved_seconds(shape, spec, layout, machine)


def _moved_seconds(shape: ModelShape, spec: Spec, layout: Layout, machine: Machine) -> float:
    """Seconds between chips: gradients of the adapter, and what split blocks exchange."""
    speed = machine.accelerator.interconnect_bandwidth
    if speed is None:
        return 0.0
    ring = 2.0 * (layout.data - 1) / layout.data * 4 * shape.adapter(spec.model.lora)
    if layout.model > 1:
        tokens = layout.rows * spec.train.row_length
        share = 2.0 * (layout.model - 1) / layout.model
        # Two sums over the devices in each block, forward and again backward.
        ring += share * 4 * len(shape.layers) * tokens * shape.hidden * _BYTES[spec.model.dtype]
    return ring / speed


def evaluation_seconds(
    shape: ModelShape,
    spec: Spec,
    asked: EvalWorkload,
    layout: Layout,
    machine: Machine,
    mfu: float,
) -> float:
    """Seconds of one pass over an evaluation's prompts.

    A decoding step reads all weights once, whatever the number of rows.
    """
    kind = machine.accelerator
    assert kind.peak_flops is not None
    assert kind.hbm_bandwidth is not None
    rows = spec.evals.batch_size
    batches = math.ceil(asked.prompts / (rows * layout.data))
    speed = kind.peak_flops * mfu * layout.model
    weights = shape.parameters * _BYTES[spec.model.dtype] / layout.model / kind.hbm_bandwidth
    length = asked.prompt_tokens + asked.new_tokens
    token = 2.0 * shape.kernels + attention_flops(shape, length, length)
    prefill = max(rows * (asked.prompt_tokens * token + 2.0 * shape.head) / speed, weights)
    cache = sum(
        2 * _BYTES[spec.model.dtype] * layer.key_value_heads * layer.head_dim
        for layer in shape.layers
    )
    read = rows * (asked.prompt_tokens + asked.new_tokens) * cache / kind.hbm_bandwidth
    decode = max(rows * (token + 2.0 * shape.head) / speed, weights + read / layout.model)
    return batches * (prefill + asked.new_tokens * decode)
