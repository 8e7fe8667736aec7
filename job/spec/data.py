"""The `data` section of the spec, and `Source`, which evaluation questions use too."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from job.spec.fields import SAMPLES, Dataset, OptionalTemplate, Positive, Template, file_format


class Section(BaseModel):
    """Base of the sections of the spec: immutable, without unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False,
        use_attribute_docstrings=True,
    )  # fmt: skip
    removed: ClassVar[Mapping[str, object]] = {}
    """Keys of earlier versions, ignored at the value at which they had no effect."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Join the lines of each description."""
        schema = handler(core_schema)
        for field in handler.resolve_ref_schema(schema)["properties"].values():
            field["description"] = " ".join(field["description"].split())
        return schema

    @model_validator(mode="before")
    @classmethod
    def _ignore_removed(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: v for k, v in values.items() if k not in cls.removed or cls.removed[k] != v}


class Source(Section):
    """A dataset of training examples or evaluation questions."""

    dataset: Dataset
    """hf://owner/name, a .json, .jsonl, .csv, .tsv, .parquet or .arrow file or a folder (local or
    gs://bucket/path), or `samples`."""
    revision: str | None = None
    """Commit, tag or branch of a Hub dataset."""
    config: str | None = None
    """Configuration name of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset or a folder."""
    data_files: list[str] | None = None
    """Files to read, or glob patterns, in the repository, folder or prefix; they replace its own
    layout."""

    @model_validator(mode="after")
    def _fits_the_place(self) -> Self:
        if self.dataset.startswith("hf://"):
            return self
        for key in ("revision", "config"):
            if getattr(self, key) is not None:
                raise ValueError(f"`{key}` applies to an hf:// dataset only; remove it")
        if self.data_files is not None and (self.dataset == SAMPLES or file_format(self.dataset)):
            raise ValueError(
                "`data_files` applies to an hf:// dataset, a folder or a gs:// prefix; remove it"
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
    """Checks of every example; examples that are flagged but not dropped are counted."""

    min_characters: Positive = 1
    """Examples whose prompt or response is shorter are dropped."""
    max_characters: Positive | None = 100_000
    """Examples with more characters in total are dropped; null: no limit."""
    drop: list[Fault] = []
    """Checks whose matches are dropped; the others are only counted. contaminated: shares a passage
    with an evaluation question."""


class ExampleSource(Source):
    """A dataset whose rows are conversations that end with a response."""

    prompt: Template | None
    """Text of the user's turn, with {column} names."""
    response: Template | None
    """Text of the model's turn, with {column} names."""
    messages: str | None = Field(None, min_length=1)
    """Column of conversations, instead of `prompt` and `response`: a list of messages with `role`
    and `content`, or `from` and `value`. Every turn of the model is trained on, except those with
    `weight: 0`. A column `tools` beside it is read too."""
    system: OptionalTemplate | None = None
    """System prompt before every prompt; may hold {column} names."""

    @model_validator(mode="before")
    @classmethod
    def _without_templates(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("messages") is not None:
            return {"prompt": None, "response": None} | given
        return given

    @model_validator(mode="after")
    def _one_mapping(self) -> Self:
        self._check_mapping()
        return self

    def _check_mapping(self) -> None:
        """Check that a row becomes a conversation in one way."""
        named = self.prompt is not None and self.response is not None
        if self.messages is None and not named:
            raise ValueError(
                "write `prompt` and `response`, texts with {column} names in them, or name the "
                "column of conversations in `messages`"
            )
        if self.messages is not None and (self.prompt or self.response):
            raise ValueError("`messages` replaces `prompt` and `response`; remove them or it")


class Data(ExampleSource):
    model_config = ConfigDict(
        json_schema_extra={
            "required": ["dataset"],
            "oneOf": [{"required": ["prompt", "response"]}, {"required": ["messages"]}],
        }
    )

    group: str | None = Field(None, min_length=1)
    """Column that names what belongs together, such as a patient: its examples are never on both
    sides of the split. Unset: examples with the same opening prompt."""
    train_examples: Positive | Literal["all"] = "all"
    """Examples to train on, sampled by a seeded hash of the row."""
    validation_examples: Annotated[int, Field(ge=2, strict=True)] = 200
    """Held-out examples, sampled the same way."""
    drop_duplicates: bool = True
    """Drop rows with the same text as another row."""
    checks: Checks = Checks()
    """Checks of every example."""
