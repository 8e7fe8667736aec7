"""The training step as a chain of programs: one for all blocks of a model that are alike.

The TPU's compiler takes longer for a step that is one program than many a training takes: it makes
each block anew, and with the whole step to choose from, not all of them alike. A chain has
five programs, whatever the number of blocks: what comes before them, a block, the head with its
loss and the loss's gradient, a block's gradient, and the optimizer; two more where blocks of
another kind are among them. Devices run them one after the other without waiting for the host.
Validation is made of the first three, and mostly needs no program of its own.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from job.model.blocks import BlockArrays, BlockwiseModel, split_into_blocks
from job.model.language_model import LanguageModel
from job.model.lora import Dropout, LoraWeights, Weights
from job.model.narrowing import gather_positions
from job.runtime import logs
from job.runtime.threads import Threads
from job.train.loss import LossSums
from job.train.step import (
    Arrays,
    StepConfig,
    StepMetrics,
    TrainState,
    dropout_for,
    head_sums,
    make_train_step,
    make_update,
    make_validation,
)

Compile = Literal["auto", "blocks", "step"]


_SMALLER_TILES = {"xla_tpu_scoped_vmem_limit_kib": "10240"}
"""A TPU's compiler takes a third less time for a block's gradient with 10 MiB of on-chip memory for
what one operation works with, instead of 16; by its own count a step then takes 2 % more cycles."""


VALIDATION = ("begin", "forward", "end")
"""The programs that a validation is made of."""


class BlockProgram(NamedTuple):
    """One program of a chain."""

    name: str
    function: Any
    """As `jax.jit` gives it."""
    arguments: tuple[Any, ...]
    times: int
    """How often a step runs it."""


class Lowered:
    """Programs that are traced and not compiled yet."""

    def __init__(self, programs: list[Any]) -> None:
        self._programs = programs

    def compile(self) -> None:
        """Compile them, all at once; JAX keeps each with its function."""
        with Threads(len(self._programs)) as pool:
            for _ in pool.map(lambda program: program.compile(), self._programs):
                pass


class _Program:
    """A compiled function whose results have shardings that are known beforehand."""

    def __init__(
        self,
        function: Callable[..., Any],
        results: Any,
        donated: Any = (),
        options: dict[str, str] | None = None,
    ) -> None:
        self.run = jax.jit(
            function, out_shardings=results, donate_argnums=donated, compiler_options=options
        )
        self._results = results

    def shapes(self, *arguments: Any) -> Any:
        """Its results without their values."""

        def placed(sharding: Any, results: Any) -> Any:
            return jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),  # type: ignore[no-untyped-call]
                results,
            )

        return jax.tree.map(placed, self._results, jax.eval_shape(self.run, *arguments))


class _Passes:
    """The programs of the passes through the model, forward and back."""

    def __init__(
        self,
        model: LanguageModel,
        blocks: BlockwiseModel,
        recipe: StepConfig,
        like: "_Passes | None" = None,
    ) -> None:
        """Args: like: passes of another recipe; what is the same in them is used again."""
        self._model = model
        self._blocks = blocks
        self._recipe = recipe
        whole, split = model.replicated, model.sharded
        around = {"segment_ids": split, "part": whole}
        begin = like.begin if like else _Program(self._begin, (split, around, split))
        self.begin: _Program = begin
        self.end = _Program(self._end, (split, whole))
        self.forward: dict[int, _Program] = {}
        self.backward: dict[int, _Program] = {}
        if like is not None and like._recipe.dropout == recipe.dropout:
            self.forward, self.backward = like.forward, like.backward
            return
        options = _SMALLER_TILES if model.platform == "tpu" else None
        for kind in set(blocks.kinds):
            kept = blocks.residual_shardings(kind)
            self.forward[kind] = _Program(self._forward_of(kind), (split, kept))
            # A gradient takes the memory of the one behind it.
            self.backward[kind] = _Program(self._backward_of(kind), (split, whole), 5, options)

    def _begin(self, outside: Weights, batch: Arrays, part: jax.Array) -> Any:
        """A part of a batch: what the first block is given, what all are, and the losses' lists."""
        rows = {name: array[part] for name, array in batch.items()}
        around = {name: rows.pop(name) for name in ("segment_ids", "part")}
        return (
            self._blocks.embed(outside, rows.pop("token_ids"), around["segment_ids"]),
            around,
            rows,
        )

    def _dropout(self, around: Arrays) -> Dropout | None:
        return dropout_for(self._recipe, around["part"])

    def _forward_of(self, kind: int) -> Callable[..., Any]:
        def forward(arrays: BlockArrays, x: jax.Array, around: Arrays) -> Any:
            segment_ids, dropout = around["segment_ids"], self._dropout(around)
            return self._blocks.forward(kind, arrays, x, segment_ids, dropout)

        return forward

    def _backward_of(self, kind: int) -> Callable[..., Any]:
        def backward(
            arrays: BlockArrays,
            x: jax.Array,
            around: Arrays,
            kept: tuple[jax.Array, ...],
            total: LoraWeights,
            gradient: jax.Array,
        ) -> Any:
            segment_ids, dropout = around["segment_ids"], self._dropout(around)
            before, own = self._blocks.backward(
                kind, arrays, x, segment_ids, kept, gradient, dropout
            )
            return before, jax.tree.map(jnp.add, total, own)

        return backward

    def _end(self, outside: Weights, x: jax.Array, lists: Arrays, total: LossSums) -> Any:
        """The gradient of what the last block gave, and the sums with this part's."""

        def loss(x: jax.Array) -> tuple[jax.Array, LossSums]:
            states = gather_positions(self._blocks.final_norm(outside, x), lists["positions"])
            smoothing = self._recipe.label_smoothing
            sums = head_sums(self._model, self._blocks.logits, outside, states, lists, smoothing)
            return sums.loss, sums

        (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(x)
        return gradient, jax.tree.map(jnp.add, total, sums)


class BlockwiseStep:
    """A step, and the validation that goes with it; called as what `make_train_step` gives is."""

    def __init__(
        self, model: LanguageModel, blocks: BlockwiseModel, optimizer: Any, recipe: StepConfig
    ) -> None:
        self._blocks = blocks
        self._passes = _Passes(model, blocks, recipe)
        plain = StepConfig(recipe.forward)
        same = not (recipe.dropout or recipe.label_smoothing)
        self._plain = self._passes if same else _Passes(model, blocks, plain, self._passes)
        self._update = jax.jit(
            make_update(optimizer, recipe), donate_argnums=0, out_shardings=model.replicated
        )
        zero: Any = np.zeros((), np.float32)
        zeros: Any = tuple(
            tuple(np.zeros(shape, np.float32) for shape in model.lora.shapes(target))
            for target in model.lora.targets
        )
        self._sums, self._gradients = model.replicate(
            (LossSums(zero, zero), [block.lora for block in blocks.arrays(model.weights, zeros)])
        )

    def __call__(
        self, state: TrainState, weights: Weights, batch: Arrays
    ) -> tuple[TrainState, StepMetrics]:
        """One step; one whose loss or gradient is not finite changes nothing."""
        run, kinds = self._passes, self._blocks.kinds
        outside, blocks = (
            self._blocks.outer(weights),
            self._blocks.arrays(weights, state.lora),
        )
        sums, totals = self._sums, list(self._gradients)
        for part in range(len(batch["part"])):
            x, around, lists = run.begin.run(outside, _rows(batch), np.int32(part))
            given, kept = [], []
            for kind, arrays in zip(kinds, blocks, strict=True):
                given.append(x)
                x, results = run.forward[kind].run(arrays, x, around)
                kept.append(results)
            gradient, sums = run.end.run(outside, x, lists, sums)
            del x, results  # the lists give them away block by block
            for number in reversed(range(len(blocks))):
                gradient, totals[number] = run.backward[kinds[number]].run(
                    blocks[number], given.pop(), around, kept.pop(), totals[number], gradient
                )
        gradients = self._blocks.join_lora(totals)
        done: tuple[TrainState, StepMetrics] = self._update(
            state, gradients, sums, batch["weights"], batch["stop"]
        )
        return done

    def validate(self, lora: LoraWeights, weights: Weights, batch: Arrays) -> LossSums:
        """The sums over one part `[1, ...]` for an adapter."""
        run = self._plain
        outside, blocks = self._blocks.outer(weights), self._blocks.arrays(weights, lora)
        x, around, lists = run.begin.run(outside, _rows(batch), np.int32(0))
        for kind, arrays in zip(self._blocks.kinds, blocks, strict=True):
            x, _ = run.forward[kind].run(arrays, x, around)
        sums: LossSums = run.end.run(outside, x, lists, self._sums)[1]
        return sums

    def links(self, state: TrainState, weights: Weights, batch: Arrays) -> Iterator[BlockProgram]:
        """The programs of a step, in their order, with arguments of which only shapes count."""
        run, kinds = self._passes, self._blocks.kinds
        outside, blocks = (
            self._blocks.outer(weights),
            self._blocks.arrays(weights, state.lora),
        )
        parts = len(batch["part"])
        first = (outside, _rows(batch), np.int32(0))
        yield BlockProgram("begin", run.begin.run, first, parts)
        x, around, lists = run.begin.shapes(*first)
        for kind in sorted(set(kinds)):
            times = parts * kinds.count(kind)
            forward = (blocks[kind], x, around)
            yield BlockProgram("forward", run.forward[kind].run, forward, times)
            _, kept = run.forward[kind].shapes(*forward)
            backward = (blocks[kind], x, around, kept, self._gradients[kind], x)
            yield BlockProgram("backward", run.backward[kind].run, backward, times)
        last = (outside, x, lists, self._sums)
        yield BlockProgram("end", run.end.run, last, parts)
        gradients = self._blocks.join_lora(self._gradients)
        update = (state, gradients, self._sums, batch["weights"], batch["stop"])
        yield BlockProgram("update", self._update, update, 1)

    def lower(self, state: TrainState, weights: Weights, batch: Arrays) -> Lowered:
        """The programs of a step, traced."""
        links = self.links(state, weights, batch)
        return Lowered([link.function.lower(*link.arguments) for link in links])


def _rows(batch: Arrays) -> Arrays:
    return {name: array for name, array in batch.items() if name != "stop"}


def make_step(
    model: LanguageModel, optimizer: Any, recipe: StepConfig, one: Compile = "auto"
) -> tuple[Any, Callable[[LoraWeights, Weights, Arrays], LossSums]]:
    """The compiled step and the compiled validation, as `make_train_step` and `make_validation`.

    Args:
        one: what is one program; see `job.spec.Train.compile`.
    """
    if one == "blocks" or (one == "auto" and model.platform == "tpu"):
        blocks = split_into_blocks(model, recipe.forward)
        if blocks is not None:
            chain = BlockwiseStep(model, blocks, optimizer, recipe)
            return chain, chain.validate
        logs.get().info(
            "the step stays one program", family=model.family, remat=recipe.forward.remat
        )
    return make_train_step(model, optimizer, recipe), make_validation(model, recipe.forward)
