"""A causal language model as pure functions of its weights.

KerasHub's layers hold the structure; the weights are passed in as a tuple, so one compiled
function serves the base model, training and the tuned model, and nothing is assigned.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding
from keras_hub.samplers import GreedySampler

from job.chat.tokenizer import ChatTokenizer
from job.model import generation
from job.model.attention import (
    ACCELERATOR,
    CPU,
    can_chunk,
    can_pack,
    chunked_attention,
    segment_attention,
)
from job.model.generation import SamplerState
from job.model.lora import LoraLayout, LoraWeights, Weights, make_lora_layout
from job.model.patching import (
    Dropout,
    Remat,
    can_narrow,
    fast_rotary,
    gather,
    lora_branches,
    narrow_last_block,
    remat_blocks,
)
from job.model.sharding import check_split, put, weight_sharding
from job.spec.schema import Model


@dataclass(frozen=True)
class Preset:
    """What KerasHub's `from_preset` is given, and the commit it is of (None if unversioned)."""

    handle: str
    revision: str | None


class ForwardConfig(NamedTuple):
    """How rows go through the backbone in training."""

    packed: bool
    """Rows hold several examples; else segment_ids are an ordinary padding mask."""
    remat: Remat = "matmuls"
    reach: int | None = None
    """Tokens of the longest example, beyond which attention need not look; None: unknown."""


class LanguageModel:
    """The structure, the frozen weights on their devices, the tokenizer, the LoRA layout."""

    def __init__(
        self, task: Any, codec: ChatTokenizer, model: Model, preset: Preset, mesh: Mesh
    ) -> None:
        self._task = task
        self._backbone = task.backbone
        self.codec = codec
        self.preset = preset
        self.mesh = mesh
        self.lora: LoraLayout = make_lora_layout(self._backbone, model.lora)
        self.parameters: int = self._backbone.count_params()
        check_split(self._backbone.variables, mesh)
        self.weights: Weights = self._place(self._backbone.variables)

    def _place(self, variables: Sequence[Any]) -> Weights:
        return tuple(put(v.value, weight_sharding(v.shape, self.mesh)) for v in variables)

    @property
    def backbone(self) -> Any:
        """KerasHub's layers."""
        return self._backbone

    @property
    def can_pack(self) -> bool:
        """Whether several examples may share a row."""
        return can_pack(self._backbone)

    @property
    def family(self) -> str:
        """The class name of the backbone."""
        return type(self._backbone).__name__

    @property
    def vocabulary(self) -> int:
        """Width of the head."""
        return int(self._backbone.token_embedding.embeddings.shape[0])

    @property
    def head_parameters(self) -> int:
        """Weights of the head, which is the embedding as well where they are tied."""
        return math.prod(self._backbone.token_embedding.embeddings.shape)

    @property
    def platform(self) -> str:
        """Where it runs: cpu, gpu, cuda, tpu, ... as JAX names it."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def devices(self) -> int:
        """Devices that a batch is split over."""
        return int(self.mesh.shape["data"])

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that every device has whole."""
        return self._sharding()

    @property
    def sharded(self) -> NamedSharding:
        """The sharding of an array whose first axis is split over the data-parallel devices."""
        return self._sharding("data")

    def replicate(self, tree: Any) -> Any:
        """Arrays, whole on every device of the mesh."""
        return jax.tree.map(lambda array: put(array, self.replicated), tree)

    def shard_batch(self, tree: Any, axis: int = 0) -> Any:
        """Host arrays whose axis `axis` is the batch, split over the data-parallel devices.

        Each process copies only the rows of its own devices.
        """
        sharding = self._sharding(*([None] * axis), "data")
        return jax.tree.map(lambda array: put(array, sharding), tree)

    def on_each_device(self, value: int) -> jax.Array:
        """int32 `[data, model]` on the mesh: each process's own value on its own devices."""
        sharding = self._sharding(*self.mesh.axis_names)
        one = np.full((1, 1), value, np.int32)
        return jax.make_array_from_callback(self.mesh.devices.shape, sharding, lambda _: one)

    def _sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, jax.P(*axes))  # type: ignore[no-untyped-call]

    @contextmanager
    def _scope(self, weights: Weights, *more: tuple[Any, jax.Array]) -> Iterator[None]:
        """Within this block the backbone has these weights."""
        mapping = [*zip(self._backbone.variables, weights, strict=True), *more]
        with keras.StatelessScope(state_mapping=mapping), fast_rotary(self._backbone):
            yield

    def inputs(self, token_ids: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """What the backbone is called with; some families want positions too."""
        inputs = {"token_ids": jnp.asarray(token_ids), "padding_mask": jnp.asarray(mask)}
        if "position_ids" in self._backbone.input:
            inputs["position_ids"] = jnp.broadcast_to(
                jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape
            )
        return inputs

    def hidden(self, weights: Weights, token_ids: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """The last hidden states.

        Args:
            weights: the backbone's variables.
            token_ids: int32 `[batch, length]`.
            segment_ids: int32 `[batch, length]`; 0 is padding, tokens attend only to earlier
                tokens of the same number.

        Returns:
            `[batch, length, hidden]` in the compute type.
        """
        with self._scope(weights), segment_attention(self._backbone):
            outputs: jax.Array = self._backbone(self.inputs(token_ids, segment_ids))
        return outputs

    def loss_states(
        self,
        weights: Weights,
        lora: LoraWeights,
        rows: Mapping[str, jax.Array],
        settings: ForwardConfig,
        dropout: Dropout | None = None,
    ) -> jax.Array:
        """The last hidden states that have a loss, of the model with an adapter.

        Args:
            weights: the frozen variables.
            lora: the adapter; the states can be differentiated by it.
            rows: `token_ids` and `segment_ids`, int32 `[batch, length]`, as for `hidden`, and
                `positions`, int32 `[groups, losses]` into the tokens of each equal part of them.
            settings: whether rows are packed, and what is kept for the backward pass.
            dropout: of the adapters' inputs.

        Returns:
            `[groups, losses, hidden]` in the compute type.
        """
        inside = self.lora.inside()
        pairs = zip(self.lora.targets, lora, strict=True)
        merged = tuple(pair for target, pair in pairs if target.equations is None)
        positions, narrow = rows["positions"], can_narrow(self._backbone)
        with (
            self._scope(inside.merge(weights, merged)),
            segment_attention(self._backbone) if settings.packed else nullcontext(),
            self.attention(rows["segment_ids"], settings.reach),
            lora_branches(self._backbone, self.lora, lora, dropout),
            narrow_last_block(self._backbone, positions) if narrow else nullcontext(),
            remat_blocks(self._backbone, settings.remat),
        ):
            outputs: jax.Array = self._backbone(self.inputs(rows["token_ids"], rows["segment_ids"]))
        return outputs if narrow else gather(outputs, positions)

    def attention(self, segment_ids: jax.Array, reach: int | None) -> AbstractContextManager[None]:
        """Within this block attention looks no further than `reach` tokens, where that pays."""
        if reach is None or not can_chunk(self._backbone):
            return nullcontext()
        cut = CPU if self.platform == "cpu" else ACCELERATOR
        return chunked_attention(self._backbone, segment_ids, reach, cut)

    def states_at(
        self,
        weights: Weights,
        token_ids: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        reach: int | None = None,
    ) -> jax.Array:
        """The last hidden states at some positions, and no more of the last block than they need.

        Args:
            weights: the backbone's variables.
            token_ids, segment_ids: int32 `[batch, length]`, as for `hidden`; where the model cannot
                be packed, segment_ids are 1 on the tokens.
            positions: int32 `[groups, n]` into the tokens of each equal part of the rows.
            reach: tokens of the longest prompt, if known.

        Returns:
            `[groups, n, hidden]` in the compute type.
        """
        narrow = can_narrow(self._backbone)
        with (
            self._scope(weights),
            segment_attention(self._backbone) if self.can_pack else nullcontext(),
            self.attention(segment_ids, reach),
            narrow_last_block(self._backbone, positions) if narrow else nullcontext(),
        ):
            outputs: jax.Array = self._backbone(self.inputs(token_ids, segment_ids))
        return outputs if narrow else gather(outputs, positions)

    def plain_hidden(self, weights: Weights, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """The last hidden states `[batch, length, hidden]` with an ordinary padding mask."""
        with self._scope(weights):
            outputs: jax.Array = self._backbone(self.inputs(token_ids, mask))
        return outputs

    def logits(self, weights: Weights, hidden: jax.Array) -> jax.Array:
        """Float32 logits `[..., vocabulary]` of hidden states `[..., hidden]`."""
        with self._scope(weights):
            logits = self._backbone.token_embedding(hidden, reverse=True)
        return jnp.asarray(logits, jnp.float32)

    def answers(
        self,
        weights: Weights,
        token_ids: jax.Array,
        lengths: jax.Array,
        limit: int,
        stop_ids: Sequence[int],
        drawn: SamplerState | None = None,
    ) -> jax.Array:
        """Decoding, traceable: greedy without `drawn`.

        Args:
            weights: the backbone's variables.
            token_ids: int32 `[batch, length]`, prompts at the beginning of their rows.
            lengths: int32 `[batch]`, tokens of each prompt.
            limit: the most new tokens a row.
            stop_ids: decoding ends once every row has had one of these.

        Returns:
            int32 `[batch, limit]`; what follows a row's first stop token is meaningless.
        """
        if not self.can_pack:
            return self._kerashub_answers(weights, token_ids, lengths, limit, stop_ids, drawn)
        first, cache = self.prefill(weights, token_ids, lengths, limit)
        length = token_ids.shape[1]

        def follow(tokens: Any, cache: Any, turn: Any) -> tuple[jax.Array, Any]:
            return self.decode(weights, tokens, cache, length + turn, length - lengths)

        choose = generation.greedy if drawn is None else drawn.choose
        return generation.decode(first, follow, cache, limit, stop_ids, choose)

    def prefill(
        self, weights: Weights, token_ids: jax.Array, lengths: jax.Array, room: int
    ) -> tuple[jax.Array, Any]:
        """The logits after prompts, float32 `[batch, vocabulary]`, and the cache of their keys."""
        aligned = generation.left_padded(token_ids, lengths)
        starts = token_ids.shape[1] - lengths
        with self._scope(weights):
            hidden, cache = generation.prefill(self._task, aligned, starts, room)
        return self.logits(weights, hidden), cache

    def decode(
        self, weights: Weights, tokens: jax.Array, cache: Any, place: Any, starts: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Logits after one more token a row, and the new cache; see `generation.next_logits`."""
        with self._scope(weights):
            return generation.decode_step(self._task, tokens, cache, place, starts)

    def _kerashub_answers(
        self,
        weights: Weights,
        token_ids: jax.Array,
        lengths: jax.Array,
        limit: int,
        stop_ids: Sequence[int],
        drawn: SamplerState | None = None,
    ) -> jax.Array:
        """The same by KerasHub's own loop, for every family of models."""
        room = jnp.pad(token_ids, ((0, 0), (0, limit)))
        mask = jnp.arange(room.shape[1]) < lengths[:, None]
        # Most families come with a sampler that draws at random.
        self._task.sampler = GreedySampler() if drawn is None else drawn.sampler
        with self._scope(weights, *([] if drawn is None else drawn.mapping())):
            outputs = self._task.generate_step(
                {"token_ids": room, "padding_mask": mask}, stop_token_ids=list(stop_ids)
            )
        new = lengths[:, None] + jnp.arange(limit)
        return jnp.take_along_axis(outputs["token_ids"], new, axis=1)

    def adapted(self, layout: LoraLayout, lora: LoraWeights) -> Weights:
        """The frozen weights with an adapter merged in, on the devices."""
        shardings = tuple(weight.sharding for weight in self.weights)
        merge = jax.jit(layout.merge, out_shardings=shardings)
        merged: Weights = merge(self.weights, self.replicate(lora))
        return merged
