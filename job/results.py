"""The pydantic models of `results.json`, the results of a finished run.

Field names and nesting are a public contract (`schema_version`): tools read this file from the
bucket. It is written last, so its presence means that the run is complete.
"""

from typing import Any, Literal

from pydantic import Field

from job.scores import Evaluation, Finding, Record, ReferenceResult, RowCounts


class RunInfo(Record):
    id: str
    name: str
    status: Literal["complete"]
    started: str
    finished: str
    seconds: float
    stage_seconds: dict[str, float]
    spec_digest: str
    spec: dict[str, Any]
    resumes: int


class EnvironmentInfo(Record):
    platform: str
    device_kind: str
    devices: int
    processes: int
    python: str
    packages: dict[str, str]
    git_commit: str | None
    image: str | None


class ParameterCounts(Record):
    total: int
    trainable: int


class ModelInfo(Record):
    preset: str
    revision: str | None
    chat_template: str
    """`own` for the model's own, the name of a built-in one, or the path of a file."""
    chat_template_source: str = ""
    chat_template_sha256: str = ""
    chat_template_text: str = ""
    chat_template_ignored: bool = False
    license: str = ""
    dtype: str
    lora_rank: int
    lora_alpha: float
    lora_targets: list[str]
    parameters: ParameterCounts


class DataInfo(Record):
    dataset: str
    revision: str | None
    rows: RowCounts
    train: int
    validation: int
    grouped_by: str | None = None
    """Column of what is never on both sides of the split; null: the opening prompt."""
    left_out: int = 0
    """Valid rows on neither side because a held-out example is of their group."""
    shared_prompts: int = 0
    """Held-out examples whose opening prompt is trained on too, in another group."""
    neutralised: int
    """Rows whose text contained a control token of the chat template, which was neutralized."""
    found: dict[str, int] = Field(default={})
    """Valid rows by the checks that flagged them."""


class TokenCounts(Record):
    trained: int
    """Tokens passed through the model, without padding."""
    padded: int
    """Token positions passed through the model, padding included."""
    loss: int
    """Tokens with a loss."""


class Seconds(Record):
    total: float
    compile: float


class Losses(Record):
    """Mean cross-entropy in nats per token, over the tokens with a loss."""

    train: float
    validation_before: float | None
    validation_after: float | None


class Accuracies(Record):
    train: float
    validation: float | None


class Training(Record):
    steps: int
    kept_step: int
    """The step whose adapter was saved."""
    stopped_early: bool
    examples: int
    truncated: int
    dropped: int
    tokens: TokenCounts
    seconds: Seconds
    tokens_per_second: float
    mfu: float | None
    loss: Losses
    token_accuracy: Accuracies


class Artifact(Record):
    """A file of the run; `path` is relative to the run's folder."""

    path: str
    bytes: int
    sha256: str


class Cost(Record):
    chip_hours: float
    usd: float | None
    """Chips at list price plus the reference model; null if a chip's price is unknown."""


VerdictAnswer = Literal[
    "better", "worse", "better and worse", "no clear change", "not enough evidence"
]


class Verdict(Record):
    """Findings of the task with the most questions, of ROUGE-L, and of the held-out loss."""

    answer: VerdictAnswer | None = None
    sentence: str
    next_step: str = ""
    benchmark: Finding | None
    style: Finding | None
    loss: Finding | None = None


class Results(Record):
    schema_version: Literal[1] = 1
    verdict: Verdict
    run: RunInfo
    environment: EnvironmentInfo
    model: ModelInfo
    data: DataInfo
    training: Training
    evaluation: Evaluation
    reference: ReferenceResult
    artifacts: list[Artifact]
    cost: Cost
