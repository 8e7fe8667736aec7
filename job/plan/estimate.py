"""Memory, FLOPs, seconds and cost of a spec on a machine, by arithmetic alone.

FLOPs follow Kaplan et al. 2020 (arXiv 2001.08361): per parameter and token 2 forward and 2 for the
gradient of the activations; frozen kernels need no gradient of their own. Seconds are FLOPs at an
assumed share of peak FLOP/s, or the time to read the weights where that is longer. Memory is
summed part by part; the shares that a compiler adds are fitted to reports of the TPU compiler, and
a test compares the two.
"""

import math
from dataclasses import dataclass

from job.machine.accelerators import Machine, machine_spec
from job.machine.limits import ATTENTION_CHUNK, LOGITS_SLICE_BYTES, largest_divisor
from job.plan.model_shape import Layer, ModelShape
from job.plan.plan import MachineCost, MachinePlan, MemoryPlan
from job.plan.workload import EvalWorkload, Workload
from job.spec.schema import Mesh, Spec

MFU = 0.4
"""Assumed share of peak FLOP/s (model FLOPs utilization)."""

_BYTES = {"bfloat16": 2, "float32": 4}
_LIVE_SHARE = 0.4
"""Share of the intermediate results of a block's backward pass that are live at the same time."""

_OPTIMIZER_COPIES = {"sgd": 0.0, "adamw": 2.0, "lion": 1.0}
"""Float32 values of optimizer state per trained parameter."""


@dataclass(frozen=True)
class Layout:
    """The mesh of a machine, and the rows of a step on each data-parallel part of it."""

    data: int
    model: int
    rows: int
    """Rows of a step on each device."""
    micro: int
    """Per-device batch size; the rest of `rows` is accumulated."""


def _matmul_outputs(layer: Layer, hidden: int, model: int) -> float:
    """Return the values per token and device of a block's kernels, LoRA updates included."""
    # Those of the model's width are summed over the devices, and then replicated.
    return layer.expert_outputs / model + sum(
        linear.output / (1 if linear.output == hidden else model)
        for linear in layer.linears.values()
    )


def _elementwise(layer: Layer, hidden: int, model: int, spec: Spec) -> float:
    """Return what a block without rematerialization saves besides outputs of kernels."""
    feed = max(linear.output for linear in layer.linears.values())
    keys = visible_keys(layer, spec.train.row_length, spec.train.max_length)
    experts = layer.expert_outputs // 2 + layer.expert_sums
    heads = layer.heads * (4 * layer.head_dim + 3 * keys)
    return 8 * hidden + (experts + 3 * feed + heads) / model


def estimate_memory(
    shape: ModelShape, spec: Spec, layout: Layout, loss_share: float, limit: int | None = None
) -> MemoryPlan:
    """Return the bytes on each device of a training step.

    Args:
        loss_share: share of a row's tokens that have a loss.
        limit: bytes of a device.
    """
    size = _BYTES[spec.model.dtype]
    adapter = shape.adapter(spec.model.lora)
    tokens = layout.micro * spec.train.row_length
    saved, block = 0.0, 0.0
    for layer in shape.layers:
        outputs = _matmul_outputs(layer, shape.hidden, layout.model)
        others = _elementwise(layer, shape.hidden, layout.model, spec)
        residuals = {"blocks": 0.0, "matmuls": outputs, "none": outputs + others}
        saved += shape.hidden + residuals[spec.train.remat]
        block = max(block, 2 * shape.hidden + outputs + others)
    losses = math.ceil(tokens * loss_share)
    return MemoryPlan(
        weights=math.ceil(shape.parameters * size / layout.model),
        adapter=2 * 4 * adapter,
        optimizer=math.ceil(4 * _OPTIMIZER_COPIES[spec.train.optimizer] * adapter),
        activations=math.ceil(tokens * size * (saved + _LIVE_SHARE * block)),
        logits=min(LOGITS_SLICE_BYTES, size * losses * shape.vocabulary),
        limit=limit,
    )


def visible_keys(layer: Layer, length: int, reach: int) -> int:
    """Return the keys each query of a row of `length` tokens is scored against.

    Args:
        reach: the most tokens a query looks back; see `job.model.attention`.
    """
    reach = min(reach, layer.window or reach)
    keys = (math.ceil((reach - 1) / ATTENTION_CHUNK) + 1) * ATTENTION_CHUNK
    return keys if 2 * keys <= length else length


def attention_flops(shape: ModelShape, length: int, reach: int) -> float:
    """Return the forward FLOPs per token of attention scores and weighted sums, in all blocks."""
    return sum(
        4.0 * layer.heads * layer.head_dim * visible_keys(layer, length, reach)
        for layer in shape.layers
    )


def step_flops(shape: ModelShape, spec: Spec, work: Workload) -> float:
    """Return the FLOPs of an optimizer step, over all devices."""
    attention = attention_flops(shape, work.row_length, spec.train.max_length)
    recomputed = {"none": 0.0, "matmuls": attention, "blocks": attention + 2.0 * shape.kernels}
    token = 4.0 * shape.kernels + 3.0 * attention + recomputed[spec.train.remat]
    token += 6.0 * shape.adapter(spec.model.lora) + 4.0 * shape.head * work.loss_share
    return token * work.slots_a_step


def plan_machine(
    shape: ModelShape, spec: Spec, work: Workload, machine: Machine
) -> list[MachinePlan]:
    """Return the plan with the spec's mesh and, if that does not fit, with one that does."""
    plan = estimate(shape, spec, work, machine)
    model = spec.runtime.mesh.model
    sharded = plan
    while sharded.memory.fits is False and (model := model * 2) <= machine.chips:
        runtime = spec.runtime.model_copy(update={"mesh": Mesh(data="auto", model=model)})
        changed = spec.model_copy(update={"runtime": runtime})
        sharded = estimate(shape, changed, work, machine)
    if plan.memory.fits is not False:
        return [plan]
    plan.advice += _ways_to_fit(shape, spec, work, machine, sharded)
    return [plan, sharded] if sharded.memory.fits else [plan]


def _ways_to_fit(
    shape: ModelShape, spec: Spec, work: Workload, machine: Machine, sharded: MachinePlan
) -> list[str]:
    """Return the settings with which the spec would fit; `sharded` is with the largest mesh."""

    def fits(**changes: str) -> bool | None:
        train = spec.train.model_copy(update=changes)
        changed = spec.model_copy(update={"train": train})
        return estimate(shape, changed, work, machine).memory.fits

    if spec.train.micro_batch != "auto" and fits(micro_batch="auto"):
        return ["train.micro_batch auto"]
    ways = ["train.remat blocks"] if fits(remat="blocks") else []
    if sharded.memory.fits:
        ways.append(f"runtime.mesh.model {sharded.mesh['model']}")
    return ways or ["a machine with more memory or more chips"]


def estimate(shape: ModelShape, spec: Spec, work: Workload, machine: Machine) -> MachinePlan:
    """Estimate a spec on a machine; the mesh is the spec's, as far as there are chips for it."""
    layout, work, advice = _layout(shape, spec, work, machine)
    kind = machine.accelerator
    flops = step_flops(shape, spec, work)
    step = stages = seconds = cost = None
    if kind.peak_flops and kind.hbm_bandwidth:
        weights = shape.parameters * _BYTES[spec.model.dtype] / layout.model
        step = max(
            flops / (layout.data * layout.model) / kind.peak_flops / MFU,
            2 * (layout.rows // layout.micro) * weights / kind.hbm_bandwidth,
        )
        step += _communication_seconds(shape, spec, layout, machine)
        # Validation is a forward pass: less than half the time of training on the same rows.
        rows = math.ceil(work.validation_rows / layout.data) * layout.data
        validation = work.validations * rows * step / work.batch_size / 2
        evals = sum(
            evaluation_seconds(shape, spec, each, layout, machine) for each in work.evaluations
        )
        stages = {"baseline": evals, "train": work.steps * step + validation, "finetuned": evals}
        seconds = sum(stages.values())
        if kind.price is not None:
            cost = MachineCost(
                on_demand=machine.cost(seconds),
                spot=machine.cost(seconds, spot=True),
                prices_of=kind.price.date,
            )
    return MachinePlan(
        **machine_spec(machine),
        mesh={"data": layout.data, "model": layout.model},
        batch_size=work.batch_size,
        steps=work.steps,
        rows_a_device=layout.rows,
        micro_batch=layout.micro,
        memory=estimate_memory(shape, spec, layout, work.loss_share, kind.hbm_bytes),
        flops_a_step=flops,
        step_seconds=step,
        tokens_per_second=None if step is None else work.slots_a_step / step,
        stage_seconds=stages,
        seconds=seconds,
        cost=cost,
        advice=advice,
    )


def _layout(
    shape: ModelShape, spec: Spec, work: Workload, machine: Machine
) -> tuple[Layout, Workload, list[str]]:
    mesh, chips = spec.runtime.mesh, machine.chips
    model = min(mesh.model, chips)
    data = max(1, chips // model) if mesh.data == "auto" else mesh.data
    advice: list[str] = []
    if data * model > chips:
        data = max(1, chips // model)
        advice.append(f"runtime.mesh.data {data}")
    if work.batch_size % data:
        batch = math.ceil(work.batch_size / data) * data
        work = work.model_copy(update={"batch_size": batch})
        advice.append(f"train.batch_size {batch}")
    rows = work.batch_size // data
    if spec.train.micro_batch != "auto":
        return Layout(data, model, rows, math.gcd(spec.train.micro_batch, rows)), work, advice

    def fits(micro: int) -> bool:
        trial, limit = Layout(data, model, rows, micro), machine.accelerator.hbm_bytes
        return estimate_memory(shape, spec, trial, work.loss_share, limit).fits is not False

    return Layout(data, model, rows, largest_divisor(rows, fits)), work, advice


def _communication_seconds(
    shape: ModelShape, spec: Spec, layout: Layout, machine: Machine
) -> float:
    """Return the seconds to all-reduce the adapter's gradients and sharded activations."""
    speed = machine.accelerator.interconnect_bandwidth
    if speed is None:
        return 0.0
    ring = 2.0 * (layout.data - 1) / layout.data * 4 * shape.adapter(spec.model.lora)
    if layout.model > 1:
        tokens = layout.rows * spec.train.row_length
        share = 2.0 * (layout.model - 1) / layout.model
        # Two all-reduces per block, in the forward and in the backward pass.
        ring += share * 4 * len(shape.layers) * tokens * shape.hidden * _BYTES[spec.model.dtype]
    return ring / speed


def evaluation_seconds(
    shape: ModelShape,
    spec: Spec,
    evaluation: EvalWorkload,
    layout: Layout,
    machine: Machine,
) -> float:
    """Return the seconds of one pass over an evaluation's prompts.

    A decoding step reads all weights once, whatever the batch size.
    """
    kind = machine.accelerator
    assert kind.peak_flops is not None
    assert kind.hbm_bandwidth is not None
    rows = spec.evals.batch_size
    batches = math.ceil(evaluation.prompts / (rows * layout.data))
    speed = kind.peak_flops * MFU * layout.model
    weights = shape.parameters * _BYTES[spec.model.dtype] / layout.model / kind.hbm_bandwidth
    length = evaluation.prompt_tokens + evaluation.new_tokens
    token = 2.0 * shape.kernels + attention_flops(shape, length, length)
    prefill = max(rows * (evaluation.prompt_tokens * token + 2.0 * shape.head) / speed, weights)
    cache = sum(
        2 * _BYTES[spec.model.dtype] * layer.key_value_heads * layer.head_dim
        for layer in shape.layers
    )
    read = rows * length * cache / kind.hbm_bandwidth
    decode = max(rows * (token + 2.0 * shape.head) / speed, weights + read / layout.model)
    return batches * (prefill + evaluation.new_tokens * decode)
