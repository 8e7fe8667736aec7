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

from job.model.decoder_blocks import BlockContext, BlockwiseModel, split_into_blocks
from job.model.language_model import LanguageModel
from job.model.lora import LoraWeights, Weights
from job.model.narrowing import gather_positions
from job.runtime import logs
from job.train.loss import LossSums
from job.train.state import TrainState
from job.train.step import (
    Arrays,
    StepConfig,
    StepMetrics,
    ValidationStep,
    apply_gradients,
    dropout_for,
    head_loss,
    make_train_step,
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


class BlockwiseStep:
    """A training step of block programs, called like the result of `make_train_step`."""

    def __init__(
        self, model: LanguageModel, blocks: BlockwiseModel, optimizer: Any, config: StepConfig
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._config = config
        replicated, sharded = model.replicated, model.sharded
        context: Any = {"segment_ids": sharded, "dropout": replicated}
        self.begin: Any = jax.jit(
            self._begin, out_shardings=(sharded, BlockContext(**context), sharded)
        )
        self.end: Any = jax.jit(self._end, out_shardings=(sharded, replicated))
        self.forward: dict[int, Any] = {}
        self.backward: dict[int, Any] = {}
        options = _SMALLER_TILES if model.platform == "tpu" else None
        for kind in set(blocks.kinds):
            self.forward[kind] = jax.jit(
                partial(blocks.forward, kind),
                out_shardings=(sharded, blocks.residual_shardings(kind)),
            )
            self.backward[kind] = jax.jit(
                partial(blocks.backward, kind),
                out_shardings=(sharded, replicated),
                donate_argnums=5,  # the gradient of the block's output, to that of its input
                compiler_options=options,
            )
        self._update: Any = jax.jit(
            partial(apply_gradients, optimizer), donate_argnums=0, out_shardings=replicated
        )
        zero: Any = np.zeros((), np.float32)
        zeros: Any = tuple(
            tuple(np.zeros(shape, np.float32) for shape in model.lora.shapes(target))
            for target in model.lora.targets
        )
        self._zero_sums, self._zero_gradients = model.replicate(
            (LossSums(zero, zero), [block.lora for block in blocks.arrays(model.weights, zeros)])
        )

    def _begin(self, weights: Weights, batch: Arrays, index: jax.Array, rate: jax.Array) -> Any:
        """Return a micro-batch's first block input, its context and its loss positions."""
        rows = {name: array[index] for name, array in batch.items() if name != "stop"}
        segment_ids, dropout = rows.pop("segment_ids"), None
        number = rows.pop("micro_batch")
        if self._config.dropout:
            dropout = dropout_for(self._config, number)._replace(rate=rate)
        x = self._blocks.embed(weights, rows.pop("token_ids"), segment_ids)
        return x, BlockContext(segment_ids, dropout), rows

    def _end(self, weights: Weights, x: jax.Array, losses: Arrays, total: LossSums) -> Any:
        """Return the gradient of the last block's output, and the loss added to the total."""

        def loss(x: jax.Array) -> tuple[jax.Array, LossSums]:
            hidden = gather_positions(self._blocks.final_norm(weights, x), losses["positions"])
            sums = head_loss(self._model, weights, hidden, losses)
            return sums.loss, sums

        (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(x)
        return gradient, jax.tree.map(jnp.add, total, sums)

    def __call__(
        self, state: TrainState, weights: Weights, batch: Arrays
    ) -> tuple[TrainState, StepMetrics]:
        """Run a step. A step whose loss or gradient is not finite changes nothing."""
        kinds, rate = self._blocks.kinds, np.float32(self._config.dropout)
        blocks = self._blocks.arrays(weights, state.lora)
        sums, gradients = self._zero_sums, list(self._zero_gradients)
        for index in range(len(batch["micro_batch"])):
            x, context, losses = self.begin(weights, batch, np.int32(index), rate)
            inputs, residuals = [], []
            for kind, arrays in zip(kinds, blocks, strict=True):
                inputs.append(x)
                x, activations = self.forward[kind](arrays, x, context)
                residuals.append(activations)
            gradient, sums = self.end(weights, x, losses, sums)
            del x, activations  # so that popping the lists frees each block's arrays
            for number in reversed(range(len(blocks))):
                backward, total = self.backward[kinds[number]], gradients[number]
                gradient, gradients[number] = backward(
                    blocks[number], inputs.pop(), context, residuals.pop(), total, gradient
                )
        joined = self._blocks.join_lora(gradients)
        result: tuple[TrainState, StepMetrics] = self._update(state, joined, sums, batch)
        return result

    def validate(self, lora: LoraWeights, weights: Weights, batch: Arrays) -> LossSums:
        """Compute the loss of one micro-batch `[1, ...]`, without dropout."""
        blocks = self._blocks.arrays(weights, lora)
        x, context, losses = self.begin(weights, batch, np.int32(0), np.float32(0))
        for kind, arrays in zip(self._blocks.kinds, blocks, strict=True):
            x, _ = self.forward[kind](arrays, x, context)
        sums: LossSums = self.end(weights, x, losses, self._zero_sums)[1]
        return sums

    def block_programs(
        self, state: TrainState, weights: Weights, batch: Arrays
    ) -> Iterator[BlockProgram]:
        """Yield the programs of a step in their order; arguments may be shapes."""
        kinds, blocks = self._blocks.kinds, self._blocks.arrays(weights, state.lora)
        micro_batches = len(batch["micro_batch"])
        begin = (weights, batch, np.int32(0), np.float32(0))
        yield BlockProgram("begin", self.begin, begin, micro_batches)
        x, context, losses = jax.eval_shape(self.begin, *begin)
        for kind in sorted(set(kinds)):
            times = micro_batches * kinds.count(kind)
            forward = (blocks[kind], x, context)
            yield BlockProgram("forward", self.forward[kind], forward, times)
            _, residuals = jax.eval_shape(self.forward[kind], *forward)
            backward = (blocks[kind], x, context, residuals, self._zero_gradients[kind], x)
            yield BlockProgram("backward", self.backward[kind], backward, times)
        end = (weights, x, losses, self._zero_sums)
        yield BlockProgram("end", self.end, end, micro_batches)
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
        compile_mode: `train.compile` of the spec.
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
