"""A causal language model as pure functions of its weights.

KerasHub's layers hold the structure; the weights are passed in as a tuple, so one compiled
function serves the base model, training and the tuned model, and nothing is assigned.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
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
    Chunking,
    chunked_attention,
    left_padded_attention,
    segment_attention,
)
from job.model.families import family_of
from job.model.generation import SamplerState
from job.model.lora import (
    Dropout,
    LoraLayout,
    LoraWeights,
    Weights,
    lora_branches,
    make_lora_layout,
)
from job.model.narrowing import gather_positions, narrow_last_block
from job.model.remat import Remat, remat_blocks
from job.model.rotary import fast_rotary
from job.model.sharding import DATA_AXIS, check_shardable, device_put, weight_sharding
from job.spec.schema import Model


@dataclass(frozen=True)
class Preset:
    """An argument of KerasHub's `from_preset`, and its commit (None if unversioned)."""

    handle: str
    revision: str | None


class ForwardConfig(NamedTuple):
    """Options of a forward pass."""

    packed: bool
    """Rows may have several examples; otherwise `segment_ids` are an ordinary padding mask."""
    remat: Remat = "matmuls"
    longest: int | None = None
    """Tokens of the longest example, beyond which attention need not look; None if unknown."""


class LanguageModel:
    """A KerasHub task, its frozen weights on their devices, its tokenizer and its LoRA layout."""

    def __init__(
        self,
        task: Any,
        tokenizer: ChatTokenizer,
        model: Model,
        preset: Preset,
        mesh: Mesh,
        put: Callable[[Any, NamedSharding], Any] = device_put,
    ) -> None:
        """Place the weights of a task with `put`, which gives an array its sharding."""
        self.task = task
        self.backbone = task.backbone
        self.tokenizer = tokenizer
        self.preset = preset
        self.mesh = mesh
        self._put = put
        self.lora: LoraLayout = make_lora_layout(self.backbone, model.lora)
        self.parameters: int = self.backbone.count_params()
        self.chunking: Chunking = CPU if self.platform == "cpu" else ACCELERATOR
        variables = self.backbone.variables
        check_shardable(variables, mesh)
        self.weights: Weights = tuple(
            put(v.value, weight_sharding(v.shape, mesh)) for v in variables
        )

    # What the model is.

    @property
    def family(self) -> str:
        """The class name of the backbone."""
        return type(self.backbone).__name__

    @property
    def can_pack(self) -> bool:
        """Whether several examples may share a row."""
        return family_of(self.backbone) is not None

    @property
    def vocabulary(self) -> int:
        """The vocabulary size."""
        return int(self.backbone.token_embedding.embeddings.shape[0])

    @property
    def head_parameters(self) -> int:
        """The number of weights of the head, tied to the embedding or not."""
        return math.prod(self.backbone.token_embedding.embeddings.shape)

    # Where it runs.

    @property
    def platform(self) -> str:
        """The platform as JAX names it: cpu, gpu, tpu, ..."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def devices(self) -> int:
        """The number of data-parallel devices, over which a batch is split."""
        return int(self.mesh.shape[DATA_AXIS])

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that every device holds in full."""
        return self._sharding()

    @property
    def sharded(self) -> NamedSharding:
        """The sharding of an array whose first axis is split over the data-parallel devices."""
        return self._sharding(DATA_AXIS)

    def replicate(self, tree: Any) -> Any:
        """Copy a tree of arrays to every device of the mesh."""
        return jax.tree.map(lambda array: self._put(array, self.replicated), tree)

    def shard_batch(self, tree: Any, axis: int = 0) -> Any:
        """Split host arrays over the data-parallel devices along `axis`.

        Each process copies only the rows of its own devices.
        """
        sharding = self._sharding(*([None] * axis), DATA_AXIS)
        return jax.tree.map(lambda array: self._put(array, sharding), tree)

    def process_local(self, value: int) -> jax.Array:
        """Return int32 `[data, model]`: each process's own value on its own devices."""
        values = np.full(self.mesh.devices.shape, value, np.int32)
        array: jax.Array = self._put(values, self._sharding(*self.mesh.axis_names))
        return array

    def _sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, jax.P(*axes))  # type: ignore[no-untyped-call]

    # Its forward passes, all traceable.

    def hidden_states(
        self,
        weights: Weights,
        batch: Mapping[str, jax.Array],
        config: ForwardConfig,
        lora: LoraWeights | None = None,
        dropout: Dropout | None = None,
    ) -> jax.Array:
        """Compute the last hidden states at some positions.

        Args:
            weights: the backbone's variables.
            batch: int32 `token_ids` and `segment_ids` `[rows, length]`; 0 is padding, and tokens
                attend only to earlier tokens of their own segment. `positions` `[groups, n]`, see
                `gather_positions`.
            config: whether rows are packed, and what is saved for the backward pass.
            lora: an adapter for `self.lora`; the states are differentiable with respect to it.
            dropout: of the adapter's inputs.

        Returns:
            `[groups, n, hidden]` in the compute dtype.
        """
        segment_ids, positions = batch["segment_ids"], batch["positions"]
        narrow = family_of(self.backbone) is not None
        with (
            self.with_weights(self._merge_unbranched(weights, lora)),
            segment_attention(self.backbone) if config.packed else nullcontext(),
            self.chunked_attention(segment_ids, config.longest),
            nullcontext()
            if lora is None
            else lora_branches(self.backbone, self.lora, lora, dropout),
            narrow_last_block(self.backbone, positions) if narrow else nullcontext(),
            remat_blocks(self.backbone, config.remat),
        ):
            outputs: jax.Array = self.backbone(self.inputs(batch["token_ids"], segment_ids))
        return outputs if narrow else gather_positions(outputs, positions)

    def logits(self, weights: Weights, hidden: jax.Array) -> jax.Array:
        """Compute float32 logits `[..., vocabulary]` of hidden states `[..., hidden]`."""
        with self.with_weights(weights):
            logits = self.backbone.token_embedding(hidden, reverse=True)
        return jnp.asarray(logits, jnp.float32)

    def inputs(self, token_ids: jax.Array, padding_mask: jax.Array) -> dict[str, jax.Array]:
        """Return the backbone's inputs; some families expect positions too."""
        inputs = {"token_ids": jnp.asarray(token_ids), "padding_mask": jnp.asarray(padding_mask)}
        if "position_ids" in self.backbone.input:
            inputs["position_ids"] = jnp.broadcast_to(
                jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape
            )
        return inputs

    def chunked_attention(
        self, segment_ids: jax.Array, longest: int | None
    ) -> AbstractContextManager[None]:
        """Make attention look no further than `longest` tokens, where that pays off."""
        if longest is None or family_of(self.backbone) is None:
            return nullcontext()
        return chunked_attention(self.backbone, segment_ids, longest, self.chunking)

    @contextmanager
    def with_weights(self, weights: Weights, *more: tuple[Any, jax.Array]) -> Iterator[None]:
        """Run the backbone with these weights, and values of other variables."""
        mapping = [*zip(self.backbone.variables, weights, strict=True), *more]
        with keras.StatelessScope(state_mapping=mapping), fast_rotary(self.backbone):
            yield

    def _merge_unbranched(self, weights: Weights, lora: LoraWeights | None) -> Weights:
        """Merge the adapters that cannot run as branches."""
        if lora is None:
            return weights
        rest = [n for n, target in enumerate(self.lora.targets) if target.equations is None]
        layout = replace(self.lora, targets=tuple(self.lora.targets[n] for n in rest))
        return layout.merge(weights, tuple(lora[n] for n in rest))

    # Decoding, traceable.

    def generate(
        self,
        weights: Weights,
        token_ids: jax.Array,
        lengths: jax.Array,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampler: SamplerState | None = None,
    ) -> jax.Array:
        """Decode a batch of prompts, greedily without a sampler.

        Args:
            weights: the backbone's variables.
            token_ids: int32 `[batch, length]`, prompts at the beginning of their rows.
            lengths: int32 `[batch]`, tokens of each prompt.
            max_new_tokens: the most new tokens per row.
            stop_ids: decoding ends once every row has had one of these.

        Returns:
            int32 `[batch, max_new_tokens]`; what follows a row's first stop token is meaningless.
        """
        if not self.can_pack:
            return self.generate_with_kerashub(
                weights, token_ids, lengths, max_new_tokens, stop_ids, sampler
            )
        length = token_ids.shape[1]

        def next_logits(tokens: Any, cache: Any, step: Any) -> tuple[jax.Array, Any]:
            return self.decode_step(weights, tokens, cache, length + step, length - lengths)

        prefilled = self.prefill(weights, token_ids, lengths, max_new_tokens)
        choose = generation.greedy if sampler is None else sampler.choose
        return generation.decode(prefilled, next_logits, max_new_tokens, stop_ids, choose)

    def prefill(
        self, weights: Weights, token_ids: jax.Array, lengths: jax.Array, max_new_tokens: int
    ) -> tuple[jax.Array, Any]:
        """Run prompts; arguments as for `generate`.

        Returns:
            The logits after each prompt, float32 `[batch, vocabulary]`, and the key-value cache.
        """
        batch, length = token_ids.shape
        padded, starts = generation.left_pad(token_ids, lengths), length - lengths
        with self.with_weights(weights), left_padded_attention(self.backbone, starts):
            cache = generation.empty_cache(self.task, batch, length + max_new_tokens)
            _, hidden, cache = self.task.call_with_cache(
                token_ids=padded, cache=cache, cache_update_index=0
            )
        return self.logits(weights, hidden[:, -1]), cache

    def decode_step(
        self, weights: Weights, tokens: jax.Array, cache: Any, index: Any, starts: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Run one more token per row, int32 `[batch]`, at `index` of the rows.

        Args:
            starts: int32 `[batch]`, index of each prompt's first token.

        Returns:
            Logits, float32 `[batch, vocabulary]`, and the new cache.
        """
        with self.with_weights(weights), left_padded_attention(self.backbone, starts):
            logits, _, cache = self.task.call_with_cache(
                token_ids=tokens[:, None], cache=cache, cache_update_index=index
            )
        return jnp.asarray(logits[:, 0], jnp.float32), cache

    def generate_with_kerashub(
        self,
        weights: Weights,
        token_ids: jax.Array,
        lengths: jax.Array,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampler: SamplerState | None = None,
    ) -> jax.Array:
        """Decode by KerasHub's own loop, which works for every family."""
        padded = jnp.pad(token_ids, ((0, 0), (0, max_new_tokens)))
        mask = jnp.arange(padded.shape[1]) < lengths[:, None]
        # Most families come with a sampler that draws at random.
        self.task.sampler = GreedySampler() if sampler is None else sampler.sampler
        with self.with_weights(weights, *([] if sampler is None else sampler.mapping())):
            outputs = self.task.generate_step(
                {"token_ids": padded, "padding_mask": mask}, stop_token_ids=list(stop_ids)
            )
        new = lengths[:, None] + jnp.arange(max_new_tokens)
        return jnp.take_along_axis(outputs["token_ids"], new, axis=1)

    # A tuned model.

    def merged_weights(self, layout: LoraLayout, lora: LoraWeights) -> Weights:
        """Return the frozen weights with an adapter merged in, sharded as they are."""
        shardings = tuple(weight.sharding for weight in self.weights)
        merge = jax.jit(layout.merge, out_shardings=shardings)
        merged: Weights = merge(self.weights, self.replicate(lora))
        return merged
