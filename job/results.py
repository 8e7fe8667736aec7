"""The models of `results.json`: what a finished run says, and where each number came from.

Field names and nesting are a public contract (`schema_version`): tools read this file from
the bucket. It is written last, so its presence means that the run is whole.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1

Interval = tuple[float, float]
Finding = Literal["improved", "worse", "no measurable change"]


class Record(BaseModel):
    """A part of the results: immutable, and nothing in it that is not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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
    dtype: str
    lora_rank: int
    lora_alpha: float
    lora_targets: list[str]
    parameters: ParameterCounts


class RowCounts(Record):
    raw: int
    valid: int
    dropped: dict[str, int]


class DataInfo(Record):
    dataset: str
    revision: str | None
    rows: RowCounts
    train: int
    validation: int
    neutralised: int
    """Rows whose text held a control token of the chat template, made harmless."""
    found: dict[str, int] = {}
    """Usable rows by what the checks found in them."""


class TokenCounts(Record):
    trained: int
    """Real tokens passed through the model, padding not counted."""
    padded: int
    """Token slots passed through the model, padding counted."""
    loss: int
    """Tokens that had a loss."""


class Seconds(Record):
    total: float
    compile: float


class Losses(Record):
    """Mean cross-entropy in nats a token, over the tokens the spec puts a loss on."""

    train: float
    validation_before: float | None
    validation_after: float | None


class Accuracies(Record):
    train: float
    validation: float | None


class Training(Record):
    steps: int
    kept_step: int
    """The step after which the adapter is as it was kept."""
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


class ModelScore(Record):
    """One model on one multiple-choice slice."""

    correct: int
    unparsed: int
    missing: int
    accuracy: float
    ci95: Interval
    letters: dict[str, int]
    """How often each letter was chosen."""


class Share(Record):
    count: int
    of: int
    share: float
    ci95: Interval


class GroupScore(Record):
    """Right answers to the questions of one group, such as a subject; for reading, untested."""

    name: str
    questions: int
    models: dict[str, Share]


class PairedTest(Record):
    """Model `b` against model `a` on what both answered."""

    a: str
    b: str
    difference: float
    """Of `b` to `a`: above 0 where `b` is higher."""
    ci95: Interval
    p_value: float
    p_holm: float
    """Corrected for all paired tests of these results (Holm 1979)."""
    finding: Finding
    """By the corrected p-value, at the 5 % level."""


class Comparison(PairedTest):
    """Accuracies on the questions that both models answered, by the exact McNemar test."""

    questions: int
    gained: int
    lost: int
    detectable: float | None
    """The smallest difference that would be found four times in five with this many questions,
    and this share of them that only one model gets right; null: none would be."""


class MultipleChoiceResult(Record):
    name: str
    scoring: Literal["letters", "generate"]
    dataset: str
    revision: str | None
    questions: int
    few_shot: int = 0
    """Solved questions before each."""
    in_training_text: int | None = None
    """Questions of which 13 words in a row stand in a training example (fewer if shorter)."""
    chance: float
    majority_letter: str
    majority_accuracy: float
    detectable_at_worst: float | None
    """The smallest difference that two models with nothing in common would need."""
    models: dict[str, ModelScore]
    comparisons: list[Comparison]
    grouped_by: str | None = None
    groups: list[GroupScore] = []


class Estimate(Record):
    mean: float
    ci95: Interval


class DialogueScore(Record):
    """ROUGE F-measures from 0 to 1, with bootstrap intervals."""

    rouge1: Estimate
    rouge2: Estimate
    rougeL: Estimate  # noqa: N815 - the name the field uses
    mean_tokens: float
    truncated: int
    """Answers cut at the limit of new tokens."""
    missing: int = 0
    """Prompts without an answer."""


class TrivialBaselines(Record):
    """ROUGE-L of answers that know nothing: any real score must beat these."""

    echoed_prompt: Estimate
    other_answer: Estimate
    polite_sentence: Estimate


class DialogueComparison(PairedTest):
    """ROUGE-L on the prompts that both models answered, by the paired bootstrap."""

    examples: int


class StyleTrait(Record):
    """A trait of style: the share of answers that show it, by phrases the spec lists."""

    name: str
    expected: Share
    """Of the answers that were held out."""
    models: dict[str, Share]
    comparison: Comparison | None


class Dialogue(Record):
    examples: int
    max_new_tokens: int
    models: dict[str, DialogueScore]
    nulls: TrivialBaselines
    comparison: DialogueComparison
    markers: list[StyleTrait] = []
    reference_comparison: DialogueComparison | None = None
    """The reference against the tuned model, where it was asked."""


class SideBySide(Record):
    id: str
    prompt: str
    expected: str | None
    answers: dict[str, str]


class Evaluation(Record):
    multiple_choice: list[MultipleChoiceResult]
    dialogue: Dialogue | None
    side_by_side: list[SideBySide]


class ReferenceTokens(Record):
    prompt: int
    completion: int
    """Reasoning included."""
    reasoning: int = 0


class ReferenceResult(Record):
    model: str | None
    provider: list[str]
    local: Literal[False] = False
    requests: int
    failed: int
    lost: int = 0
    """Requests whose reply was lost: they may have been billed beside `cost_usd`."""
    tokens: ReferenceTokens
    cost_usd: float
    status: Literal["complete", "partial", "failed", "skipped"]
    reason: str | None
    """Why it is not complete."""


class Artifact(Record):
    """A file of the run; `path` is relative to the run's folder."""

    path: str
    bytes: int
    sha256: str


class Cost(Record):
    chip_hours: float
    usd: float | None
    """Reference model only, until a price for the accelerator is known."""


class Verdict(Record):
    sentence: str
    benchmark: Finding | None
    style: Finding | None


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
