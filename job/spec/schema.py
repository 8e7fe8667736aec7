"""The schema of a job spec: one pydantic model per section, and checks across fields.

Reading YAML is `load`'s, and messages with line numbers are `problems`'. The sentence under a field
is its description, which `job schema` passes to editors.
"""

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from job.spec.data import Checks as Checks
from job.spec.data import Data as Data
from job.spec.data import Section
from job.spec.data import Source as Source
from job.spec.evals import HELD_OUT, Evals, TextEval
from job.spec.evals import MultipleChoiceEval as MultipleChoiceEval
from job.spec.fields import HUB, Name, Number, Output, Positive
from job.spec.remote import Reference


class Mesh(Section):
    data: Positive | Literal["auto"] = "auto"
    """Data-parallel size; auto: the number of devices divided by `model`."""
    model: Positive = 1
    """Devices the frozen weights are sharded over; 1: replicated on each."""


class Runtime(Section):
    removed: ClassVar[Mapping[str, object]] = {"distributed": "auto"}

    platform: Literal["any", "cpu", "gpu", "tpu"] = "any"
    """Required platform of JAX; on another the job stops (exit 3)."""
    devices: Positive | None = None
    """Required number of devices; unset accepts any."""
    mesh: Mesh = Mesh()
    """The device mesh."""
    compilation_cache: str | None = "auto"
    """Folder or gs://bucket/prefix of JAX's persistent compilation cache; auto: the user's cache
    folder, null: no cache."""
    stall_minutes: Annotated[Number, Field(gt=0)] | None = 30
    """Minutes without a finished step, batch or transfer chunk after which the job counts as
    stalled and stops (exit 4); null: never."""


class Lora(Section):
    rank: Annotated[int, Field(ge=1, le=1024, strict=True)] = 16
    """Rank of the LoRA matrices A and B."""
    alpha: Annotated[Number, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank; unset: alpha = rank."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = ["query", "value"]
    """Names of the Keras layers that get LoRA weights, or all-linear."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Dropout rate of LoRA inputs in training."""


class Model(Section):
    preset: str = Field(min_length=1)
    """hf://owner/name, kaggle://..., a KerasHub preset name, a local folder, `tiny` (random
    weights), or `smollm2-135m-instruct` (with the `demo` extra)."""
    revision: str | None = None
    """Commit, tag or branch of an hf:// preset."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the frozen weights; LoRA weights are always float32."""
    chat_template: Annotated[str, Field(min_length=1)] = "auto"
    """Chat template: auto (the model's own, else the built-in one of its turn tokens, plain for a
    pretrained model), gemma, gemma4, llama3, chatml, mistral, plain, the name of one of several
    that the model has, or the path of a Jinja file."""
    chat_template_kwargs: dict[str, JsonValue] = {}
    """Variables for the chat template, such as enable_thinking."""
    lora: Lora = Lora()
    """The LoRA adapter to train."""

    @model_validator(mode="after")
    def _revision_needs_hub(self) -> Self:
        if self.preset.startswith("hf://") and not re.fullmatch(HUB, self.preset):
            raise ValueError(f"`preset` {self.preset!r} is not hf://owner/name")
        if self.revision is not None and not self.preset.startswith("hf://"):
            raise ValueError("`revision` applies to an hf:// preset only; remove it")
        return self


class Train(Section):
    removed: ClassVar[Mapping[str, object]] = {"lora_plus_ratio": 1.0, "label_smoothing": 0.0}

    init_adapter: Annotated[str, Field(min_length=1)] | None = None
    """Adapter to start from, in this job's or PEFT's format: a run or a folder (local or gs://), or
    hf://owner/name."""
    epochs: Positive = 1
    """Passes over the training examples."""
    batch_size: Positive = 8
    """Rows per optimizer step, over all devices; a row holds one example, or several when
    packed."""
    micro_batch: Positive | Literal["auto"] = "auto"
    """Per-device batch size; larger steps accumulate gradients. auto: as many rows as are estimated
    to fit, halved whenever memory runs out."""
    remat: Literal["none", "matmuls", "blocks"] = "matmuls"
    """What a block saves for the backward pass: everything (none), the outputs of matrix products
    (matmuls), or its input only (blocks: least memory, a quarter more compute)."""
    compile: Literal["auto", "blocks", "step"] = "auto"
    """Unit of compilation: one program per kind of block (blocks: regional compilation, a third of
    the compile time for Gemma 3 1B), or the full step (step). auto: blocks on TPU if the model
    supports it, otherwise step."""
    max_length: Annotated[int, Field(ge=8, strict=True)] = 512
    """Maximum tokens of an example, prompt and response; the rest is truncated."""
    packing: bool = True
    """Pack several examples into one row."""
    buckets: Annotated[int, Field(ge=1, le=16, strict=True)] = 4
    """Number of row lengths without packing: every row is padded to the next bucket, and each
    bucket is compiled once."""
    pack_length: Annotated[int, Field(ge=8, strict=True)] | None = None
    """Tokens of a packed row; unset: 1,024, or max_length if that is more."""
    loss_on: Literal["response", "all"] = "response"
    """Tokens with a loss: assistant messages only, or every token."""
    optimizer: Literal["adamw", "sgd", "lion"] = "adamw"
    """The Keras optimizer."""
    learning_rate: Annotated[Number, Field(ge=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after warmup; linear and cosine decay to 0."""
    warmup_ratio: Annotated[Number, Field(ge=0, lt=1)] = 0.03
    """Fraction of the steps over which the learning rate rises to its peak."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Decoupled weight decay; not for sgd."""
    clip_norm: Annotated[Number, Field(gt=0)] | None = 1.0
    """Maximum global gradient norm; null turns clipping off."""
    log_every: Positive = 10
    """Steps between lines of history.jsonl."""
    checkpoint_every: Positive = 100
    """Steps between checkpoints; more if storage is slower than that."""
    validate_every: Positive | None = None
    """Steps between validations; unset: only before and after training."""
    keep: Literal["last", "best"] = "last"
    """The adapter to save: the last, or the best by validation loss."""
    patience: Positive | None = None
    """Stop early after so many validations without a better loss."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        adapter = self.init_adapter
        if adapter and adapter.startswith("hf://") and not re.fullmatch(HUB, adapter):
            raise ValueError(f"`init_adapter` {adapter!r} is not hf://owner/name")
        if self.pack_length is not None and not self.packing:
            raise ValueError("`pack_length` needs `packing: true`; remove one of them")
        if self.pack_length is not None and self.pack_length < self.max_length:
            raise ValueError(
                f"`pack_length` ({self.pack_length}) must hold an example of `max_length` tokens "
                f"({self.max_length}); raise it or lower `max_length`"
            )
        if self.compile == "blocks" and self.remat == "none":
            raise ValueError(
                "`compile` by blocks saves no more than the outputs of matrix products; set "
                "`remat` to matmuls or blocks, or `compile` to step"
            )
        for name, used in (("patience", self.patience), ("keep", self.keep == "best")):
            if used and self.validate_every is None:
                raise ValueError(f"`{name}` needs validations; set `validate_every`")
        if self.optimizer == "sgd" and self.weight_decay:
            raise ValueError(
                "`weight_decay` does not apply to sgd; remove it or change `optimizer`"
            )
        return self

    @property
    def row_length(self) -> int:
        """Tokens per row of a batch."""
        if not self.packing:
            return self.max_length
        return self.pack_length or max(1024, self.max_length)


class Spec(Section):
    """The spec of one job."""

    name: Name
    """Prefix of the run id: lowercase letters, digits, '.', '_', '-'."""
    output: Output = Field("./runs", min_length=1)
    """Folder or gs://bucket/prefix for runs."""
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0
    """Seed of sampling, row order, LoRA initialization and the bootstrap."""
    runtime: Runtime = Runtime()
    """Devices and processes."""
    model: Model
    """The model to fine-tune."""
    data: Data
    """The examples to fine-tune on."""
    train: Train = Train()
    """Hyperparameters of training."""
    evals: Evals = Evals()
    """Evaluations before and after training."""
    reference: Reference | None = None
    """A larger remote model to compare with; null: none."""

    @model_validator(mode="after")
    def _across_sections(self) -> Self:
        held_out = self.data.validation_examples
        for name in ("dialogue", "judge", "side_by_side"):
            examples = getattr(getattr(self.evals, name), "examples", None) or 0
            if examples > held_out:
                raise ValueError(
                    f"`evals.{name}.examples` ({examples}) is more than "
                    f"`data.validation_examples` ({held_out}); raise that or lower this"
                )
        if self.reference and self.reference.dialogue and self.evals.dialogue is None:
            raise ValueError(
                "`reference.dialogue` needs `evals.dialogue`, which is null; remove one of them"
            )
        if self.reference and self.reference.evals is not None:
            known = [item.name for item in self.evals.multiple_choice]
            known += [item.name for item in self.evals.tasks]
            for name in self.reference.evals:
                if name not in known:
                    listed = ", ".join(known) or "none"
                    raise ValueError(
                        f"`reference.evals` names '{name}', which is not an entry of "
                        f"multiple_choice or tasks (there are: {listed})"
                    )
        return self

    @property
    def reference_tasks(self) -> list[MultipleChoiceEval]:
        """The multiple-choice tasks the reference model answers; see `reference_text_tasks`."""
        if self.reference is None:
            return []
        tasks = self.evals.multiple_choice
        if self.reference.evals is None:
            return [item for item in tasks if item.scoring == "generate"]
        return [item for item in tasks if item.name in self.reference.evals]

    @property
    def reference_text_tasks(self) -> list[TextEval]:
        """The tasks with free answers that the reference model answers: those named, or all."""
        if self.reference is None:
            return []
        named = self.reference.evals
        return [item for item in self.evals.tasks if named is None or item.name in named]

    @property
    def sources(self) -> dict[str, Source]:
        """All datasets that the spec reads rows from, by the path of their section."""
        sources: dict[str, Source] = {"data": self.data}
        for number, entry in enumerate(self.evals.multiple_choice):
            sources[f"evals.multiple_choice.{number}"] = entry
        for number, task in enumerate(self.evals.tasks):
            if task.dataset != HELD_OUT:
                sources[f"evals.tasks.{number}"] = task
        return sources
