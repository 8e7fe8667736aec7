"""`job plan --compile`: the programs of a job through the TPU compiler, without a TPU.

They are the very functions that training and evaluation call, for the shapes that the spec leads
to with prompts of the assumed lengths; only the weights are missing. Loops count once in the
compiler's costs, so what the head's slices, accumulated rows and decoding do beyond their first
turn is added here.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from job.data.packing import Batch
from job.evals.batching import even_batch_size, packed_length, packed_rows, round_length
from job.evals.engine import Engine
from job.machine.accelerators import Accelerator, Machine
from job.model.abstract import AbstractModel, abstract_model
from job.model.language_model import ForwardConfig
from job.plan.cost_analysis import Compiled, Costs, compile_program, joined, with_costs
from job.plan.model_shape import Config
from job.plan.plan import Program
from job.plan.workload import EvalWorkload, Workload
from job.runtime import logs
from job.spec.schema import Spec
from job.train.blockwise_step import (
    VALIDATION_PROGRAMS,
    BlockProgram,
    BlockwiseStep,
    make_step,
)
from job.train.loss import LossOptions, chunk_length, chunked_cross_entropy
from job.train.memory import bytes_per_device
from job.train.optimizer import make_optimizer
from job.train.state import TrainState
from job.train.step import make_step_config, make_validation, padded_loss_count, shard_input

_WIDEST = 1.1
"""Losses of the part of a step that has most of them, over the mean."""


_NO_RATES: Mapping[str, int] = MappingProxyType({})


def most_that_fit(
    sizes: Sequence[int], estimate: int, attempt: Callable[[int], Compiled]
) -> tuple[Compiled, int]:
    """The largest of ascending sizes that fits, or the smallest where none does.

    Looked for from an estimate, size by size: where it is right that takes two attempts.
    """
    at = max(bisect.bisect(sizes, estimate) - 1, 0)
    found = attempt(sizes[at])
    if not found.fits:
        while at and not found.fits:
            at -= 1
            found = attempt(sizes[at])
        return found, sizes[at]
    for size in sizes[at + 1 :]:
        larger = attempt(size)
        if not larger.fits:
            break
        found, at = larger, at + 1
    return found, sizes[at]


class Compiler:
    """One spec's programs for one machine."""

    def __init__(
        self, spec: Spec, config: Config, work: Workload, machine: Machine, mesh: Mesh
    ) -> None:
        self.spec = spec
        self.work = work
        self._chip: Accelerator = machine.accelerator
        self.model: AbstractModel = abstract_model(spec.model, config, mesh)
        self.rows = work.batch_size // self.model.devices
        # The longest example is not known yet; none is longer than this.
        packed = spec.train.packing and self.model.can_pack
        self._forward = ForwardConfig(packed, spec.train.remat, spec.train.max_length)
        # Of steps that are chains, by rows at once: what makes a validation, compiled already.
        self._passes: dict[int, list[tuple[Compiled, int]]] = {}

    def programs(self, estimate: int) -> Iterator[Program]:
        """All programs of the job; see `fitting_step`."""
        step, micro = self.fitting_step(estimate)
        yield self._report(
            "train", step, {"tokens_per_s": self.work.slots_a_step}, rows_at_once=micro
        )
        yield self._report("validate", self.validation(micro))
        for asked in self._asked("letters"):
            rate = {"questions_per_s": self.prompts}
            yield self._report(f"letters: {asked.name}", self.letters(asked), rate)
        for asked in self._asked("generate"):
            prefill, decode, whole = self.generation(asked)
            rate = {"tokens_per_s": self.prompts}
            yield self._report(f"prefill: {asked.name}", prefill)
            yield self._report(f"decode: {asked.name}", decode, rate)
            rate = {"tokens_per_s": self.prompts * asked.new_tokens}
            yield self._report(f"generate: {asked.name}", whole, rate)

    @property
    def prompts(self) -> int:
        """Prompts at once, over all devices."""
        return self.spec.evals.batch_size * self.model.devices

    def _asked(self, scoring: str) -> Sequence[EvalWorkload]:
        """The evaluation of a kind that takes most memory; the others are like it."""
        found = [e for e in self.work.evaluations if e.scoring == scoring]
        return [max(found, key=lambda e: (e.new_tokens, e.prompts))] if found else []

    def fitting_step(self, estimate: int) -> tuple[Compiled, int]:
        """The training step with as many rows at once as fit, looked for from an estimate.

        A run begins with an estimate of its own, and only ever goes down from it.
        """
        if self.spec.train.micro_batch != "auto":
            return self.train_step(estimate), estimate
        sizes = [n for n in range(1, self.rows + 1) if self.rows % n == 0]
        return most_that_fit(sizes, estimate, self.train_step)

    def train_step(self, micro: int) -> Compiled:
        """The training step, with `micro` of a device's rows at once."""
        model, train = self.model, self.spec.train
        logs.get().info("compiling", program="train", rows_at_once=micro)
        start = model.lora.init(self.spec.seed)
        optimizer, _ = make_optimizer(train, self.work.steps, start)
        config = make_step_config(
            train, self._forward, self.spec.model.lora.dropout, self.spec.seed
        )
        state = TrainState(
            model.abstract_lora(), model.replicate(tuple(v.value for v in optimizer.variables))
        )
        step, _ = make_step(model, optimizer, config, train.compile)
        again, width = self.rows // micro, self._width(micro)
        batch = self._batch(micro, again, width)
        if isinstance(step, BlockwiseStep):
            found = self._chain(
                list(step.block_programs(state, model.weights, batch)), state, batch, micro
            )
            times = 1
        else:
            found, times = compile_program(step, state, model.weights, batch), again
        if not found.fits:
            return found
        costs = Costs(0, 0).plus(found.costs, times)
        turns = again * (self._slices(width) - 1)
        return with_costs(found, costs.plus(self._head(width, backward=True), turns))

    def _chain(self, links: Sequence[BlockProgram], state: Any, batch: Any, micro: int) -> Compiled:
        """A step of several programs, and what lies on a device when most does."""
        there, parts = [self.model.weights, state, batch], len(batch["micro_batch"])
        for link in links:
            if link.name == "backward":
                _, x, around, kept, total, gradient = link.arguments
                blocks = link.times // parts
                there += [[x, kept, total, total]] * blocks + [around, gradient, x]
        programs = [(compile_program(link.function, *link.arguments), link.times) for link in links]
        self._passes[micro] = [
            (dataclasses.replace(program, seconds=0.0, cpu_seconds=0.0), times // parts)
            for link, (program, times) in zip(links, programs, strict=True)
            if link.name in VALIDATION_PROGRAMS
        ]
        return self._joined(programs, there)

    def _joined(self, programs: Sequence[tuple[Compiled, int]], there: Any) -> Compiled:
        limit = self._chip.hbm_bytes
        assert limit
        return joined(programs, bytes_per_device(jax.tree.leaves(there)), limit)

    def validation(self, micro: int) -> Compiled:
        """The sums over one part of the validation rows, after `train_step` for as many."""
        model, width = self.model, self._width(micro)
        batch = self._batch(micro, 1, width)
        chained = micro in self._passes
        if chained:
            found = self._joined(self._passes[micro], [model.weights, model.abstract_lora(), batch])
        else:
            logs.get().info("compiling", program="validate")
            sums = make_validation(model, self._forward)
            found = compile_program(sums, model.abstract_lora(), model.weights, batch)
        if not found.fits:
            return found
        head = self._head(width, backward=chained)
        return with_costs(found, found.costs.plus(head, self._slices(width) - 1))

    def letters(self, asked: EvalWorkload) -> Compiled:
        """One batch of questions, scored by their letters."""
        logs.get().info("compiling", program="letters")
        model, mean = self.model, asked.prompt_tokens
        length = packed_length(mean) if model.can_pack else round_length(mean)
        rows = packed_rows(self.prompts, mean, length) if model.can_pack else self.prompts
        rows = even_batch_size(rows, rows, model.devices)
        integers = np.broadcast_to(np.int32(1), (rows, length))
        ends = np.broadcast_to(np.int32(0), (model.devices, self.spec.evals.batch_size))
        placed = model.shard_batch((integers, integers, ends))
        letters = jax.ShapeDtypeStruct((4,), jnp.int32)  # type: ignore[no-untyped-call]
        return compile_program(self._engine.loglikelihood_program, model.weights, *placed, letters)

    def generation(self, asked: EvalWorkload) -> tuple[Compiled, Compiled, Compiled]:
        """One batch of prompts answered: its two parts, and the whole with all turns counted."""
        first, turn = self.generation_parts(asked)
        logs.get().info("compiling", program="generate")
        tokens, lengths = self._prompt_batch(round_length(asked.prompt_tokens))
        program = jax.jit(partial(self._engine.generate_program(), limit=asked.new_tokens))
        whole = compile_program(program, self.model.weights, tokens, lengths)
        costs = first.costs.plus(turn.costs, asked.new_tokens)
        return first, turn, with_costs(whole, costs)

    def generation_parts(self, asked: EvalWorkload) -> tuple[Compiled, Compiled]:
        """The pass over a batch of prompts, and one turn of the loop that answers them."""
        logs.get().info("compiling", program="prefill and decode")
        model = self.model
        tokens, lengths = self._prompt_batch(round_length(asked.prompt_tokens))
        prefill = partial(model.prefill, max_new_tokens=asked.new_tokens)
        first = compile_program(jax.jit(prefill), model.weights, tokens, lengths)
        _, cache = jax.eval_shape(prefill, model.weights, tokens, lengths)
        step = jax.jit(model.decode_step, donate_argnums=2)
        place = jax.ShapeDtypeStruct((), jnp.int32)  # type: ignore[no-untyped-call]
        arguments = (model.weights, lengths, model.shard_batch(cache), place, lengths)
        return first, compile_program(step, *arguments)

    @property
    def _engine(self) -> Engine:
        evals = self.spec.evals
        return Engine(self.model, evals.batch_size, evals.max_prompt_tokens)

    def _prompt_batch(self, length: int) -> Any:
        shapes = (
            np.broadcast_to(np.int32(0), (self.prompts, length)),
            np.broadcast_to(np.int32(1), (self.prompts,)),
        )
        return self.model.shard_batch(shapes)

    def _width(self, micro: int) -> int:
        mean = micro * self.work.row_length * self.work.loss_share
        return padded_loss_count(min(micro * self.work.row_length, math.ceil(mean * _WIDEST)))

    def _batch(self, micro: int, again: int, width: int) -> Any:
        rows, length = again * micro * self.model.devices, self.work.row_length
        integers = np.zeros((rows, length), np.int32)
        positions = np.zeros((rows, 1), np.int32)
        batch = Batch(integers, integers, positions, positions, positions.astype(np.float32))
        return shard_input(self.model, batch, again, width)

    def _slice(self, width: int) -> int:
        return chunk_length(1, width, self.model.vocabulary, self.model.compute_dtype)

    def _slices(self, width: int) -> int:
        return math.ceil(width / self._slice(width))

    def _head(self, width: int, *, backward: bool) -> Costs:
        """What one turn of the head's loop does on a device."""
        model, length = self.model, self._slice(width)
        if self._slices(width) == 1:
            return Costs(0, 0)
        hidden = model.hidden_size

        def sums(weights: Any, states: Any, targets: Any, mask: Any) -> Any:
            def loss(states: Any) -> Any:
                options = LossOptions(length, unroll=False)
                return chunked_cross_entropy(
                    model.logits, weights, states, targets, mask, options
                ).loss

            return jax.grad(loss)(states) if backward else loss(states)

        lists = {
            "states": np.broadcast_to(
                jnp.zeros((), model.compute_dtype), (model.devices, length, hidden)
            ),
            "targets": np.broadcast_to(np.int32(0), (model.devices, length)),
            "mask": np.broadcast_to(np.float32(0), (model.devices, length)),
        }
        placed = model.shard_batch(lists)
        found = compile_program(
            jax.jit(sums), model.weights, placed["states"], placed["targets"], placed["mask"]
        )
        return found.costs

    def _report(
        self, name: str, found: Compiled, rates: Mapping[str, int] = _NO_RATES, **detail: float
    ) -> Program:
        """A program as the plan shows it, with what it does of each of `rates` in a second."""
        bounds = found.costs.bounds(self._chip)
        bound = max(bounds, key=lambda key: bounds[key])
        seconds = bounds[bound]
        if seconds:
            detail |= {name: count / seconds for name, count in rates.items()}
        return Program(
            name=name,
            fits=found.fits,
            bytes=found.memory,
            temporary_bytes=found.temporary,
            flops=found.costs.flops,
            bytes_accessed=found.costs.bytes_accessed,
            collective_bytes=found.costs.collective_bytes,
            collectives=found.collectives,
            seconds=seconds,
            bound=bound if found.fits else "does not fit",
            compile_seconds=found.seconds,
            detail=detail,
        )
