"""The `data` section of the spec, and what it shares with the questions of the evaluations."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from job.spec.fields import (
    FORMATS,
    SAMPLES,
    Dataset,
    OptionalTemplate,
    Positive,
    Template,
    names_a_file,
)


class Section(BaseModel):
    """A section of the spec: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class Source(Section):
    """Where rows come from; shared by training data and evaluation questions."""

    dataset: Dataset = Field(
        description="hf://owner/name, a .json, .jsonl, .csv or .parquet file (local, or "
        "gs://bucket/path), a folder or prefix with `data_files`, or `samples`."
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a Hub dataset.")
    config: str | None = Field(None, description="Configuration name of a Hub dataset.")
    split: str = Field("train", description="Split of a Hub dataset.")
    data_files: list[str] | None = Field(
        None,
        description="Files of the repository, folder or prefix to read, or patterns of them; "
        "of a Hub dataset instead of its own layout.",
    )

    @model_validator(mode="after")
    def _fits_the_place(self) -> Self:
        if self.dataset.startswith("hf://"):
            return self
        for key in ("revision", "config"):
            if getattr(self, key) is not None:
                raise ValueError(f"`{key}` applies to an hf:// dataset only; remove it")
        is_file = self.dataset == SAMPLES or names_a_file(self.dataset)
        if self.data_files is not None and is_file:
            raise ValueError(
                "`data_files` applies to an hf:// dataset, a folder or a gs:// prefix; remove it"
            )
        if self.data_files is None and not is_file:
            raise ValueError(
                f"`dataset`: cannot tell the format of {self.dataset!r}; a file ends in "
                f"{', '.join(FORMATS)}, a folder needs `data_files`, "
                "a dataset of the Hub is hf://owner/name"
            )
        return self


Fault = Literal[
    "normalised_duplicates",
    "control_characters",
    "html",
    "urls",
    "emails",
    "phone_numbers",
    "contaminated",
]


class Checks(Section):
    """What is looked for in every example; what is not dropped is counted and reported."""

    min_characters: Positive = Field(
        1, description="Examples whose prompt or response is shorter are dropped."
    )
    max_characters: Positive | None = Field(
        100_000, description="Examples with more characters in all are dropped; null: none are."
    )
    drop: list[Fault] = Field(
        [],
        description="Faults that examples are dropped for; others are only counted. "
        "contaminated: shares a passage with a question of the evaluations.",
    )


class Data(Source):
    model_config = ConfigDict(
        json_schema_extra={
            "required": ["dataset"],
            "oneOf": [{"required": ["prompt", "response"]}, {"required": ["messages"]}],
        }
    )

    prompt: Template | None = Field(description="Text of the user's turn, with {column} names.")
    response: Template | None = Field(description="Text of the model's turn, with {column} names.")
    messages: str | None = Field(
        None,
        min_length=1,
        description="Column that holds whole dialogues instead: a list of messages with `role` "
        "and `content`, or with `from` and `value`. Every turn of the model is trained on.",
    )
    system: OptionalTemplate | None = Field(
        None, description="Instruction put before every prompt; may hold {column} names."
    )
    train_examples: Positive | Literal["all"] = Field(
        "all", description="Examples to train on, sampled by a seeded hash of the row."
    )
    validation_examples: Annotated[int, Field(ge=2, strict=True)] = Field(
        200, description="Examples held out, sampled likewise."
    )
    drop_duplicates: bool = Field(True, description="Drop rows whose whole text was seen before.")
    checks: Checks = Field(Checks(), description="What is checked, and what is dropped for it.")

    @model_validator(mode="before")
    @classmethod
    def _without_templates(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("messages") is not None:
            return {"prompt": None, "response": None} | given
        return given

    @model_validator(mode="after")
    def _one_mapping(self) -> Self:
        named = self.prompt is not None and self.response is not None
        if self.messages is None and not named:
            raise ValueError(
                "write `prompt` and `response`, texts with {column} names in them, or name the "
                "column of whole dialogues in `messages`"
            )
        if self.messages is not None and (self.prompt or self.response):
            raise ValueError(
                "`messages` takes the place of `prompt` and `response`; remove them or it"
            )
        return self
