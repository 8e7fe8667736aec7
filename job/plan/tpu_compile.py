"""`job plan --compile`: compile the programs of a job for a TPU, without a TPU.

They are the functions that training and evaluation call, with the shapes of the spec and prompts
of the assumed lengths, but abstract weights. The compiler counts the body of a loop once, so the
other iterations of the head's chunks, of gradient accumulation and of decoding are added here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from job.data.packing import Batch
from job.evals.batching import even_batch_size, packed_length, packed_rows, round_length
from job.evals.engine import Engine
from job.machine.accelerators import Accelerator, Machine
from job.machine.limits import divisors
from job.model.abstract import abstract_model
from job.model.language_model import ForwardConfig, LanguageModel
from job.plan.cost_analysis import CompiledProgram, Costs, combine, compile_program
from job.plan.model_shape import Config
from job.plan.plan import Program
from job.plan.workload import EvalWorkload, Workload
from job.runtime import logs
from job.spec.schema import Spec
from job.train.blockwise_step import VALIDATION_PROGRAMS, BlockProgram, BlockwiseStep, make_step
from job.train.loss import LossOptions, chunk_length, chunked_cross_entropy
from job.train.memory import bytes_per_device
from job.train.optimizer import make_optimizer
from job.train.state import TrainState
from job.train.step import StepConfig, make_validation, padded_loss_count, shard_input

_PEAK_LOSSES = 1.1
"""Assumed number of losses of the micro-batch with the most, divided by the mean."""


class Compiler:
    """The programs of one spec, compiled for one machine."""

    def __init__(
        self, spec: Spec, config: Config, work: Workload, machine: Machine, mesh: Mesh
    ) -> None:
        self.spec = spec
        self.work = work
        self._chip: Accelerator = machine.accelerator
        self.model: LanguageModel = abstract_model(spec.model, config, mesh)
        self._lora = self.model.lora.init(spec.seed)
        self.rows = work.batch_size // self.model.devices
        # No example is longer than max_length.
        packed = spec.train.packing and self.model.can_pack
        self._forward = ForwardConfig(packed, spec.train.remat, spec.train.max_length)
        # By micro-batch: programs of a block-wise step that validation shares.
        self._shared: dict[int, list[tuple[CompiledProgram, int]]] = {}

    def programs(self, estimate: int) -> Iterator[Program]:
        """Yield all programs of the job; see `fitting_step` for the estimate."""
        step, micro = self.fitting_step(estimate)
        rate = {"tokens_per_s": self.work.slots_a_step}
        yield self._report("train", step, rate, micro_batch=micro)
        yield self._report("validate", self.validation(micro), {})
        for work in self._largest("letters"):
            rate = {"questions_per_s": self.prompts}
            yield self._report(f"letters: {work.name}", self.letters(work), rate)
        for work in self._largest("generate"):
            prefill, decode, generation = self.generation(work)
            rate = {"tokens_per_s": self.prompts}
            yield self._report(f"prefill: {work.name}", prefill, {})
            yield self._report(f"decode: {work.name}", decode, rate)
            rate = {"tokens_per_s": self.prompts * work.new_tokens}
            yield self._report(f"generate: {work.name}", generation, rate)

    @property
    def prompts(self) -> int:
        """Batch size of prompts over all devices."""
        return self.spec.evals.batch_size * self.model.devices

    def _largest(self, scoring: str) -> Sequence[EvalWorkload]:
        """Return the evaluation of this scoring that needs the most memory, if there is one."""
        evaluations = [e for e in self.work.evaluations if e.scoring == scoring]
        largest = max(evaluations, key=lambda e: (e.new_tokens, e.prompts), default=None)
        return [largest] if largest else []

    def fitting_step(self, estimate: int) -> tuple[CompiledProgram, int]:
        """Return the training step with the largest micro-batch that fits, and that micro-batch.

        Like a run, it starts with an estimate and only reduces it.
        """
        sizes = [estimate]
        if self.spec.train.micro_batch == "auto":
            sizes = [n for n in divisors(self.rows) if n <= estimate]
        for micro in sizes:
            program = self.train_step(micro)
            if program.fits:
                break
        return program, micro

    def train_step(self, micro: int) -> CompiledProgram:
        """Return the training step with a per-device batch size of `micro`."""
        model, train = self.model, self.spec.train
        logs.get().info("compiling", program="train", micro_batch=micro)
        optimizer, _ = make_optimizer(train, self.work.steps, self._lora)
        config = StepConfig(self._forward, self.spec.model.lora.dropout, self.spec.seed)
        variables = tuple(variable.value for variable in optimizer.variables)
        state = model.replicate(TrainState(self._lora, variables))
        step, _ = make_step(model, optimizer, config, train.compile)
        accumulation, width = self.rows // micro, self._loss_width(micro)
        batch = self._batch(micro, accumulation, width)
        if isinstance(step, BlockwiseStep):
            blocks = list(step.block_programs(state, model.weights, batch))
            program, times = self._blockwise(blocks, state, batch, micro), 1
        else:
            program, times = compile_program(step, state, model.weights, batch), accumulation
        if not program.fits:
            return program
        costs = Costs(0, 0).plus(program.costs, times)
        more = accumulation * (self._loss_chunks(width) - 1)
        return replace(program, costs=costs.plus(self._head(width, backward=True), more))

    def _blockwise(
        self, blocks: Sequence[BlockProgram], state: Any, batch: Any, micro: int
    ) -> CompiledProgram:
        """Compile a block-wise step, with the arrays that are on a device at its peak."""
        resident, micro_batches = [self.model.weights, state, batch], len(batch["micro_batch"])
        for block in blocks:
            if block.name == "backward":
                _, x, around, saved, total, gradient = block.arguments
                count = block.times // micro_batches
                resident += [[x, saved, total, total]] * count + [around, gradient, x]
        programs = [(compile_program(b.function, *b.arguments), b.times) for b in blocks]
        self._shared[micro] = [
            (replace(program, seconds=0.0, cpu_seconds=0.0), times // micro_batches)
            for block, (program, times) in zip(blocks, programs, strict=True)
            if block.name in VALIDATION_PROGRAMS
        ]
        return self._combine(programs, resident)

    def _combine(
        self, programs: Sequence[tuple[CompiledProgram, int]], resident: Any
    ) -> CompiledProgram:
        limit = self._chip.hbm_bytes
        assert limit
        return combine(programs, bytes_per_device(jax.tree.leaves(resident)), limit)

    def validation(self, micro: int) -> CompiledProgram:
        """Return the validation of one micro-batch; after `train_step` it shares its programs."""
        model, width = self.model, self._loss_width(micro)
        batch = self._batch(micro, 1, width)
        shared = self._shared.get(micro)
        if shared:
            program = self._combine(shared, [model.weights, model.replicate(self._lora), batch])
        else:
            logs.get().info("compiling", program="validate")
            sums = make_validation(model, self._forward)
            program = compile_program(sums, model.replicate(self._lora), model.weights, batch)
        if not program.fits:
            return program
        head = self._head(width, backward=bool(shared))
        return replace(program, costs=program.costs.plus(head, self._loss_chunks(width) - 1))

    def letters(self, work: EvalWorkload) -> CompiledProgram:
        """Return the log-likelihoods of the letters for one batch of questions."""
        logs.get().info("compiling", program="letters")
        model, mean = self.model, work.prompt_tokens
        length = packed_length(mean) if model.can_pack else round_length(mean)
        rows = packed_rows(self.prompts, mean, length) if model.can_pack else self.prompts
        rows = even_batch_size(rows, rows, model.devices)
        integers = np.broadcast_to(np.int32(1), (rows, length))
        ends = np.broadcast_to(np.int32(0), (model.devices, self.spec.evals.batch_size))
        placed = model.shard_batch((integers, integers, ends))
        letters = jax.ShapeDtypeStruct((4,), jnp.int32)  # type: ignore[no-untyped-call]
        return compile_program(self._engine.loglikelihood_program, model.weights, *placed, letters)

    def generation(
        self, work: EvalWorkload
    ) -> tuple[CompiledProgram, CompiledProgram, CompiledProgram]:
        """Return prefill, one decoding step, and the complete generation of a batch of prompts."""
        first, step = self.generation_parts(work)
        logs.get().info("compiling", program="generate")
        tokens, lengths = self._prompt_batch(round_length(work.prompt_tokens))
        function = jax.jit(partial(self._engine.generate_program, limit=work.new_tokens))
        program = compile_program(function, self.model.weights, tokens, lengths)
        costs = first.costs.plus(step.costs, work.new_tokens)
        return first, step, replace(program, costs=costs)

    def generation_parts(self, work: EvalWorkload) -> tuple[CompiledProgram, CompiledProgram]:
        """Return prefill and one decoding step of a batch of prompts."""
        logs.get().info("compiling", program="prefill and decode")
        model = self.model
        tokens, lengths = self._prompt_batch(round_length(work.prompt_tokens))
        prefill = partial(model.prefill, max_new_tokens=work.new_tokens)
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

    def _loss_width(self, micro: int) -> int:
        """Return the padded number of losses of a micro-batch."""
        mean = micro * self.work.row_length * self.work.loss_share
        return padded_loss_count(min(micro * self.work.row_length, math.ceil(mean * _PEAK_LOSSES)))

    def _batch(self, micro: int, accumulation: int, width: int) -> Any:
        rows, length = accumulation * micro * self.model.devices, self.work.row_length
        integers = np.zeros((rows, length), np.int32)
        batch = Batch(integers, integers, np.zeros((rows, length), bool))
        return shard_input(self.model, batch, accumulation, width)

    def _chunk_length(self, width: int) -> int:
        return chunk_length(1, width, self.model.vocabulary, self.model.backbone.compute_dtype)

    def _loss_chunks(self, width: int) -> int:
        return math.ceil(width / self._chunk_length(width))

    def _head(self, width: int, *, backward: bool) -> Costs:
        """Return the costs of one iteration of the head's loop."""
        model, length = self.model, self._chunk_length(width)
        if self._loss_chunks(width) == 1:
            return Costs(0, 0)
        states = jnp.zeros((), model.backbone.compute_dtype)

        def sums(weights: Any, states: Any, targets: Any, mask: Any) -> Any:
            def loss(states: Any) -> Any:
                options = LossOptions(length, unroll=False)
                return chunked_cross_entropy(
                    model.logits, weights, states, targets, mask, options
                ).loss

            return jax.grad(loss)(states) if backward else loss(states)

        lists = {
            "states": np.broadcast_to(states, (model.devices, length, model.backbone.hidden_dim)),
            "targets": np.broadcast_to(np.int32(0), (model.devices, length)),
            "mask": np.broadcast_to(np.float32(0), (model.devices, length)),
        }
        placed = model.shard_batch(lists)
        return compile_program(
            jax.jit(sums), model.weights, placed["states"], placed["targets"], placed["mask"]
        ).costs

    def _report(
        self, name: str, program: CompiledProgram, rates: dict[str, int], **detail: float
    ) -> Program:
        """Return a program as the plan shows it, with the counts of `rates` per second."""
        bounds = program.costs.bounds(self._chip)
        bound = max(bounds, key=lambda key: bounds[key])
        seconds = bounds[bound]
        if seconds:
            detail |= {name: count / seconds for name, count in rates.items()}
        return Program(
            name=name,
            fits=program.fits,
            bytes=program.memory,
            temporary_bytes=program.temporary,
            **asdict(program.costs),
            collectives=program.collectives,
            seconds=seconds,
            bound=bound if program.fits else "does not fit",
            compile_seconds=program.seconds,
            detail=detail,
        )
