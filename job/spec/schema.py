"""The job spec: one pydantic model a section, and the checks that need more than one field.

Only the shape lives here; reading YAML, overrides and messages with line numbers are in
`spec_loading`. Nothing heavy is imported: `job validate` and `job schema` use this alone.
Every field has a sentence that says what it does, which `job schema` hands to editors.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from job.spec.data import Checks as Checks
from job.spec.data import Data as Data
from job.spec.data import Section as Section
from job.spec.data import Source as Source
from job.spec.evals import DialogueEval as DialogueEval
from job.spec.evals import Evals as Evals
from job.spec.evals import MultipleChoiceEval as MultipleChoiceEval
from job.spec.evals import Reference as Reference
from job.spec.fields import HUB, Name, Number, Output, Positive


class Mesh(Section):
    data: Positive | Literal["auto"] = Field(
        "auto", description="Parts the batch is split into; auto: the devices over `model`."
    )
    model: Positive = Field(
        1, description="Devices that each hold a part of the frozen weights; 1: each holds all."
    )


class Distributed(Section):
    """How the processes of one job find each other, where they cannot tell by themselves."""

    address: Annotated[str, Field(pattern=r"^[^\s:]+:\d{1,5}$")] = Field(
        description="host:port of process 0, which all processes can reach."
    )
    processes: Positive = Field(description="Number of processes, one a machine as a rule.")
    index: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None, description="Number of this process, from 0; unset: JOB_PROCESS_INDEX has it."
    )


class Runtime(Section):
    platform: Literal["any", "cpu", "gpu", "tpu"] = Field(
        "any", description="The platform JAX must find; the job stops (exit 3) on another."
    )
    devices: Positive | None = Field(
        None, description="The exact number of devices the job must find; unset takes any."
    )
    mesh: Mesh = Field(Mesh(), description="How the devices are used.")
    distributed: Distributed | Literal["auto", "off"] = Field(
        "auto",
        description="Several processes as one job. auto: TPU slices by themselves, elsewhere by "
        "JOB_COORDINATOR_ADDRESS, JOB_PROCESS_COUNT and JOB_PROCESS_INDEX.",
    )
    compilation_cache: str | None = Field(
        "auto",
        description="Folder or gs://bucket/prefix of JAX's persistent compilation cache; auto is "
        "the user's cache folder, null turns it off.",
    )
    stall_minutes: Annotated[Number, Field(gt=0)] | None = Field(
        30,
        description="The job ends (exit 4) where no step, batch or piece of a transfer is done "
        "for so long; null: it waits for ever.",
    )


class Lora(Section):
    rank: Annotated[int, Field(ge=1, le=1024, strict=True)] = Field(
        16, description="Rank of A and B."
    )
    alpha: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="The update is scaled by alpha / rank; unset means alpha = rank."
    )
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        ["query", "value"],
        description="Names of the Keras layers that get an adapter, or all-linear.",
    )
    rslora: bool = Field(
        False, description="Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)."
    )
    dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of an adapter's inputs that are dropped in training."
    )


class Model(Section):
    preset: str = Field(
        min_length=1,
        description="hf://owner/name, kaggle://..., a KerasHub preset name, a local preset "
        "folder, or `tiny`: a small random Gemma 3 made on the spot.",
    )
    revision: str | None = Field(None, description="Commit, tag or branch of an hf:// preset.")
    dtype: Literal["bfloat16", "float32", "float16"] = Field(
        "bfloat16", description="Type of the frozen weights; LoRA weights are always float32."
    )
    chat_template: Literal["auto", "gemma", "plain"] = Field(
        "auto",
        description="How prompts are wrapped; auto is gemma where the tokenizer has its turn "
        "tokens and plain elsewhere.",
    )
    lora: Lora = Field(Lora(), description="The adapter that is trained.")

    @model_validator(mode="after")
    def _revision_needs_hub(self) -> Self:
        if self.preset.startswith("hf://") and not re.fullmatch(HUB, self.preset):
            raise ValueError(f"`preset` {self.preset!r} is not hf://owner/name")
        if self.revision is not None and not self.preset.startswith("hf://"):
            raise ValueError("`revision` applies to an hf:// preset only; remove it")
        return self


class Train(Section):
    init_adapter: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="An adapter to go on from: a run or a folder (local or gs://), or "
        "hf://owner/name; this job's or PEFT's.",
    )
    epochs: Positive = Field(1, description="Passes over the training examples.")
    batch_size: Positive = Field(
        8,
        description="Rows of an optimizer step over all devices (a row holds one example, "
        "or several when packed).",
    )
    micro_batch: Positive | Literal["auto"] = Field(
        "auto",
        description="Rows a device holds at once; the rest is accumulated. auto: as many as are "
        "estimated to fit, and half of them whenever they do not.",
    )
    remat: Literal["none", "matmuls", "blocks"] = Field(
        "matmuls",
        description="What a block keeps for the backward pass: everything (none), the results of "
        "matrix products (matmuls), or only its input (blocks: least memory, a quarter more work).",
    )
    compile: Literal["auto", "blocks", "step"] = Field(
        "auto",
        description="What is compiled as one program: each kind of block, which is run once for "
        "every block (blocks: regional compilation, a third of the time for Gemma 3 1B), or the "
        "whole step. auto: blocks on a TPU, step elsewhere and for models that cannot be taken "
        "apart.",
    )
    max_length: Annotated[int, Field(ge=8, strict=True)] = Field(
        512, description="Tokens of an example, prompt and response; the rest is cut off."
    )
    packing: bool = Field(True, description="Put several examples into one row.")
    buckets: Annotated[int, Field(ge=1, le=16, strict=True)] = Field(
        4,
        description="Row lengths where rows hold one example each: every row is padded to the "
        "next of them, and each length is compiled once.",
    )
    pack_length: Annotated[int, Field(ge=8, strict=True)] | None = Field(
        None, description="Tokens of a packed row; unset: 1,024, or max_length if that is more."
    )
    loss_on: Literal["response", "all"] = Field(
        "response", description="Which tokens have a loss: the response's, or the prompt's too."
    )
    optimizer: Literal["adamw", "sgd", "lion", "adafactor", "muon"] = Field(
        "adamw",
        description="The Keras optimizer; muon leaves what is not a matrix to AdamW.",
    )
    lora_plus_ratio: Annotated[Number, Field(gt=0)] = Field(
        1.0, description="Learning rate of B over that of A (LoRA+)."
    )
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the target that is spread over the vocabulary, in training."
    )
    learning_rate: Annotated[Number, Field(ge=0)] = Field(2e-4, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How the rate falls after the warm-up; linear and cosine end at 0."
    )
    warmup_ratio: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.03, description="Share of the steps over which the rate rises from 0."
    )
    weight_decay: Annotated[Number, Field(ge=0)] = Field(
        0.0, description="Decoupled weight decay; not for sgd."
    )
    clip_norm: Annotated[Number, Field(gt=0)] | None = Field(
        1.0, description="Global gradient norm is clipped to this; null turns clipping off."
    )
    log_every: Positive = Field(10, description="Steps between lines of history.jsonl.")
    checkpoint_every: Positive = Field(
        100, description="Steps between checkpoints; more where storage is slower than that."
    )
    validate_every: Positive | None = Field(
        None, description="Steps between validation losses; unset: before and after training only."
    )
    keep: Literal["last", "best"] = Field(
        "last", description="The adapter that is kept: the last, or that of the best validation."
    )
    patience: Positive | None = Field(
        None, description="Validations without a better loss after which training stops early."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        adapter = self.init_adapter
        if adapter and adapter.startswith("hf://") and not re.fullmatch(HUB, adapter):
            raise ValueError(f"`init_adapter` {adapter!r} is not hf://owner/name")
        if self.pack_length is not None and not self.packing:
            raise ValueError("`pack_length` needs `packing: true`; remove one of them")
        if self.pack_length is not None and self.pack_length < self.max_length:
            raise ValueError(
                f"`pack_length` ({self.pack_length}) must hold an example of `max_length` "
                f"({self.max_length}) tokens; raise it or lower `max_length`"
            )
        if self.compile == "blocks" and self.remat == "none":
            raise ValueError(
                "`compile` by blocks keeps no more than the results of matrix products; set "
                "`remat` to matmuls or blocks, or `compile` to step"
            )
        for name, used in (("patience", self.patience), ("keep", self.keep == "best")):
            if used and self.validate_every is None:
                raise ValueError(f"`{name}` needs validations to go by; set `validate_every`")
        if self.optimizer == "sgd" and self.weight_decay:
            raise ValueError(
                "`weight_decay` does not apply to sgd; remove it or change `optimizer`"
            )
        return self

    @property
    def row_length(self) -> int:
        """Tokens of a row of the batch."""
        if not self.packing:
            return self.max_length
        return self.pack_length or max(1024, self.max_length)


class Spec(Section):
    """A whole job."""

    name: Name = Field(description="Begins the run id: lower case letters, digits, '.', '_', '-'.")
    output: Output = Field(
        "./runs", min_length=1, description="Folder or gs://bucket/prefix that holds the runs."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = Field(
        0, description="Seeds sampling, order, LoRA start and bootstrap."
    )
    runtime: Runtime = Field(Runtime(), description="The machine the job needs.")
    model: Model = Field(description="The model that is measured and fine-tuned.")
    data: Data = Field(description="The dialogues it is fine-tuned on.")
    train: Train = Field(Train(), description="How it is fine-tuned.")
    evals: Evals = Field(Evals(), description="How it is measured, before and after.")
    reference: Reference | None = Field(
        None, description="A larger remote model to compare with; null leaves it out."
    )

    @model_validator(mode="after")
    def _across_sections(self) -> Self:
        held_out = self.data.validation_examples
        if self.evals.dialogue and (self.evals.dialogue.examples or 0) > held_out:
            raise ValueError(
                f"`evals.dialogue.examples` ({self.evals.dialogue.examples}) is more than "
                f"`data.validation_examples` ({held_out}); raise that or lower this"
            )
        if (self.evals.side_by_side.examples or 0) > held_out:
            raise ValueError(
                f"`evals.side_by_side.examples` ({self.evals.side_by_side.examples}) is more than "
                f"`data.validation_examples` ({held_out}); raise that or lower this"
            )
        if self.reference and self.reference.dialogue and self.evals.dialogue is None:
            raise ValueError(
                "`reference.dialogue` needs `evals.dialogue`, which is null; remove one of them"
            )
        if self.reference and self.reference.evals is not None:
            known = [item.name for item in self.evals.multiple_choice]
            for name in self.reference.evals:
                if name not in known:
                    listed = ", ".join(known) or "none"
                    raise ValueError(
                        f"`reference.evals` names '{name}', which is not a multiple_choice "
                        f"entry (there are: {listed})"
                    )
        return self

    @property
    def reference_slices(self) -> list[MultipleChoiceEval]:
        """What the reference model is asked: the spec's choice, or the slices it can answer."""
        if self.reference is None:
            return []
        slices = self.evals.multiple_choice
        if self.reference.evals is None:
            return [item for item in slices if item.scoring == "generate"]
        return [item for item in slices if item.name in self.reference.evals]
