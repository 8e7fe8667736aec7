"""The block-wise step: a training step made of several programs, one for all identical blocks.

The TPU's compiler takes longer for a step that is one program than many trainings take to run: it
compiles every block anew. A block-wise step has five programs, whatever the number of blocks:
`begin` (before the first block), `forward` (a block), `end` (the loss, and its gradient by the last
block's output), `backward` (a block's gradient) and `update` (the optimizer). A model with several
kinds of blocks has a `forward` and a `backward` for each. Devices run the programs one after
another without waiting for the host. Validation uses the first three, and usually needs no program
of its own.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from job.model.decoder_blocks import BlockArrays, BlockwiseModel, split_into_blocks
from job.model.language_model import LanguageModel
from job.model.lora import Dropout, LoraWeights, Weights
from job.model.narrowing import gather_positions
from job.runtime import logs
from job.train.loss import LossSums
from job.train.state import TrainState
from job.train.step import (
    Arrays,
    StepConfig,
    StepMetrics,
    ValidationStep,
    dropout_for,
    head_loss,
    make_train_step,
    make_update,
    make_validation,
)

CompileMode = Literal["auto", "blocks", "step"]
_SMALLER_TILES = {"xla_tpu_scoped_vmem_limit_kib": "10240"}
"""Makes the TPU's compiler take a third less time for a block's gradient: it gives an operation
10 MiB of on-chip memory instead of 16. By the compiler's count a step takes 2% more cycles."""

VALIDATION_PROGRAMS = ("begin", "forward", "end")


class BlockProgram(NamedTuple):
    """One program of a block-wise step."""

    name: str
    function: Any
    """The function as `jax.jit` returns it."""
    arguments: tuple[Any, ...]
    times: int
    """How often a step runs it."""


class BlockPrograms:
    """The programs of the forward and the backward pass."""

    def __init__(
        self,
        model: LanguageModel,
        blocks: BlockwiseModel,
        config: StepConfig,
        shared: "BlockPrograms | None" = None,
    ) -> None:
        """Prepare the programs; those of `shared`, for another config, are reused if identical."""
        self._model = model
        self._blocks = blocks
        self._config = config
        replicated, sharded = model.replicated, model.sharded
        context = {"segment_ids": sharded, "micro_batch": replicated}
        outputs = (sharded, context, sharded)
        self.begin: Any = shared.begin if shared else jax.jit(self._begin, out_shardings=outputs)
        self.end = jax.jit(self._end, out_shardings=(sharded, replicated))
        self.forward: dict[int, Any] = {}
        self.backward: dict[int, Any] = {}
        if shared is not None and shared._config.dropout == config.dropout:
            self.forward, self.backward = shared.forward, shared.backward
            return
        options = _SMALLER_TILES if model.platform == "tpu" else None
        for kind in set(blocks.kinds):
            residuals = blocks.residual_shardings(kind)
            self.forward[kind] = jax.jit(
                partial(self._forward, kind), out_shardings=(sharded, residuals)
            )
            self.backward[kind] = jax.jit(
                partial(self._backward, kind),
                out_shardings=(sharded, replicated),
                donate_argnums=5,  # the gradient of the block's output, to that of its input
                compiler_options=options,
            )

    def _begin(self, weights: Weights, batch: Arrays, index: jax.Array) -> Any:
        """Return a micro-batch's first block input, its context and its loss positions."""
        rows = {name: array[index] for name, array in batch.items() if name != "stop"}
        context = {name: rows.pop(name) for name in ("segment_ids", "micro_batch")}
        x = self._blocks.embed(weights, rows.pop("token_ids"), context["segment_ids"])
        return x, context, rows

    def _dropout(self, context: Arrays) -> Dropout | None:
        return dropout_for(self._config, context["micro_batch"])

    def _forward(self, kind: int, arrays: BlockArrays, x: jax.Array, context: Arrays) -> Any:
        segment_ids, dropout = context["segment_ids"], self._dropout(context)
        return self._blocks.forward(kind, arrays, x, segment_ids, dropout)

    def _backward(
        self,
        kind: int,
        arrays: BlockArrays,
        x: jax.Array,
        context: Arrays,
        residuals: tuple[jax.Array, ...],
        total: LoraWeights,
        gradient: jax.Array,
    ) -> Any:
        """Return the gradient of a block's input, and its adapter's added to the total."""
        segment_ids, dropout = context["segment_ids"], self._dropout(context)
        x_gradient, lora_gradient = self._blocks.backward(
            kind, arrays, x, segment_ids, residuals, gradient, dropout
        )
        return x_gradient, jax.tree.map(jnp.add, total, lora_gradient)

    def _end(self, weights: Weights, x: jax.Array, losses: Arrays, total: LossSums) -> Any:
        """Return the gradient of the last block's output, and the loss added to the total."""

        def loss(x: jax.Array) -> tuple[jax.Array, LossSums]:
            hidden = gather_positions(self._blocks.final_norm(weights, x), losses["positions"])
            smoothing = self._config.label_smoothing
            sums = head_loss(self._model, weights, hidden, losses, smoothing)
            return sums.loss, sums

        (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(x)
        return gradient, jax.tree.map(jnp.add, total, sums)


class BlockwiseStep:
    """A training step of block programs, called like the result of `make_train_step`."""

    def __init__(
        self, model: LanguageModel, blocks: BlockwiseModel, optimizer: Any, config: StepConfig
    ) -> None:
        self._blocks = blocks
        self.programs = BlockPrograms(model, blocks, config)
        self._validation_programs = self.programs
        if config.dropout or config.label_smoothing:
            plain = StepConfig(config.forward)
            self._validation_programs = BlockPrograms(model, blocks, plain, self.programs)
        self._update = jax.jit(
            make_update(optimizer, config), donate_argnums=0, out_shardings=model.replicated
        )
        zero: Any = np.zeros((), np.float32)
        zeros: Any = tuple(
            tuple(np.zeros(shape, np.float32) for shape in model.lora.shapes(target))
            for target in model.lora.targets
        )
        self._zero_sums, self._zero_gradients = model.replicate(
            (LossSums(zero, zero), [block.lora for block in blocks.arrays(model.weights, zeros)])
        )

    def __call__(
        self, state: TrainState, weights: Weights, batch: Arrays
    ) -> tuple[TrainState, StepMetrics]:
        """Run a step. A step whose loss or gradient is not finite changes nothing."""
        programs, kinds = self.programs, self._blocks.kinds
        blocks = self._blocks.arrays(weights, state.lora)
        sums, gradients = self._zero_sums, list(self._zero_gradients)
        for index in range(len(batch["micro_batch"])):
            x, context, losses = programs.begin(weights, batch, np.int32(index))
            inputs, residuals = [], []
            for kind, arrays in zip(kinds, blocks, strict=True):
                inputs.append(x)
                x, activations = programs.forward[kind](arrays, x, context)
                residuals.append(activations)
            gradient, sums = programs.end(weights, x, losses, sums)
            del x, activations  # so that popping the lists frees each block's arrays
            for number in reversed(range(len(blocks))):
                backward, total = programs.backward[kinds[number]], gradients[number]
                gradient, gradients[number] = backward(
                    blocks[number], inputs.pop(), context, residuals.pop(), total, gradient
                )
        joined = self._blocks.join_lora(gradients)
        result: tuple[TrainState, StepMetrics] = self._update(state, joined, sums, batch)
        return result

    def validate(self, lora: LoraWeights, weights: Weights, batch: Arrays) -> LossSums:
        """Compute the loss of one micro-batch `[1, ...]`, without dropout or smoothing."""
        programs = self._validation_programs
        blocks = self._blocks.arrays(weights, lora)
        x, context, losses = programs.begin(weights, batch, np.int32(0))
        for kind, arrays in zip(self._blocks.kinds, blocks, strict=True):
            x, _ = programs.forward[kind](arrays, x, context)
        sums: LossSums = programs.end(weights, x, losses, self._zero_sums)[1]
        return sums

    def block_programs(
        self, state: TrainState, weights: Weights, batch: Arrays
    ) -> Iterator[BlockProgram]:
        """Yield the programs of a step in their order; arguments may be shapes."""
        programs, kinds = self.programs, self._blocks.kinds
        blocks = self._blocks.arrays(weights, state.lora)
        micro_batches = len(batch["micro_batch"])
        begin = (weights, batch, np.int32(0))
        yield BlockProgram("begin", programs.begin, begin, micro_batches)
        x, context, losses = jax.eval_shape(programs.begin, *begin)
        for kind in sorted(set(kinds)):
            times = micro_batches * kinds.count(kind)
            forward = (blocks[kind], x, context)
            yield BlockProgram("forward", programs.forward[kind], forward, times)
            _, residuals = jax.eval_shape(programs.forward[kind], *forward)
            backward = (blocks[kind], x, context, residuals, self._zero_gradients[kind], x)
            yield BlockProgram("backward", programs.backward[kind], backward, times)
        end = (weights, x, losses, self._zero_sums)
        yield BlockProgram("end", programs.end, end, micro_batches)
        gradients = self._blocks.join_lora(self._zero_gradients)
        update = (state, gradients, self._zero_sums, batch)
        yield BlockProgram("update", self._update, update, 1)


def make_step(
    model: LanguageModel, optimizer: Any, config: StepConfig, compile_mode: CompileMode = "auto"
) -> tuple[Any, ValidationStep]:
    """Return the compiled step and the compiled validation.

    Args:
        model: the model.
        optimizer: a Keras optimizer built for the model's LoRA weights.
        config: the step's configuration.
        compile_mode: what is one program (`train.compile`); auto is blocks on TPUs.
    """
    if compile_mode == "blocks" or (compile_mode == "auto" and model.platform == "tpu"):
        blocks = split_into_blocks(model, config.forward)
        if blocks is not None:
            step = BlockwiseStep(model, blocks, optimizer, config)
            return step, step.validate
        logs.get().info(
            "block-wise step unavailable", family=model.family, remat=config.forward.remat
        )
    return make_train_step(model, optimizer, config), make_validation(model, config.forward)
