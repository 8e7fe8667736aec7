"""The pydantic models of `results.json`, the results of a finished run.

Field names and nesting are a public contract (`schema_version`): tools read this file from the
bucket. It is written last, so its presence means that the run is complete.
"""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1
Interval = tuple[float, float]
Finding = Literal[
    "improved", "worse", "no measurable change", "not enough evidence", "not worse", "cannot tell"
]
"""Of a retention task: not worse, worse, or cannot tell."""


class Record(BaseModel):
    """Base of the parts of the results: immutable, without undeclared fields."""

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
    grouped_by: str | None = None
    """Column of what is never on both sides of the split; null: the opening prompt."""
    left_out: int = 0
    """Valid rows on neither side because a held-out example is of their group."""
    shared_prompts: int = 0
    """Held-out examples whose opening prompt is trained on too, in another group."""
    neutralised: int
    """Rows whose text contained a control token of the chat template, which was neutralized."""
    found: dict[str, int] = {}
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


class ModelScore(Record):
    """One model on one multiple-choice task."""

    correct: int
    unparsed: int
    truncated: int = 0
    """Generated answers cut off at the limit of new tokens."""
    cut_in_thoughts: int = 0
    """Those of them that are thoughts only, and so unparsed."""
    missing: int
    accuracy: float
    ci95: Interval
    letters: dict[str, int]
    """Number of times each letter was chosen."""


class Share(Record):
    count: int
    of: int
    share: float
    ci95: Interval


class GroupScore(Record):
    """Accuracy on one group of questions, such as a subject; descriptive, not tested."""

    name: str
    questions: int
    models: dict[str, Share]


class PairedTest(Record):
    """Model `b` compared with model `a` on the examples that both answered."""

    lower_is_better: ClassVar[bool] = False
    a: str
    b: str
    family: Literal["primary", "retention", "secondary"] = "primary"
    """The first two decide the verdict: tasks, baseline compared with fine-tuned."""
    difference: float
    """`b` minus `a`: positive where `b` is higher."""
    ci95: Interval
    p_value: float
    p_holm: float
    """`p_value` corrected for all tests of the family (Holm 1979)."""
    finding: Finding
    detectable: float | None = None
    """Minimum detectable effect at 80% power and the corrected level; null: none is detectable."""
    margin: float | None = None
    """Drop that a retention task accepts."""
    p_not_worse: float | None = None
    """One-sided p-value for a drop of at least the margin (non-inferiority)."""


class Comparison(PairedTest):
    """Accuracies on the questions that both models answered: the exact McNemar test."""

    questions: int
    gained: int
    lost: int


class MultipleChoiceResult(Record):
    name: str
    scoring: Literal["letters", "generate"]
    dataset: str
    revision: str | None
    questions: int
    rows: RowCounts | None = None
    """Rows read and used, and why others were left out; null in results from before they were."""
    truncated_prompts: int = 0
    """Prompts that lost their beginning, to fit `evals.max_prompt_tokens`."""
    few_shot: int = 0
    in_training_text: int | None = None
    """Questions that share 13 consecutive words (fewer if shorter) with a training example."""
    chance: float
    majority_letter: str
    majority_accuracy: float
    detectable_at_worst: float | None
    """Minimum detectable effect of two models whose errors are independent."""
    models: dict[str, ModelScore]
    comparisons: list[Comparison]
    grouped_by: str | None = None
    groups: list[GroupScore] = []


class Estimate(Record):
    mean: float
    ci95: Interval


class DialogueScore(Record):
    """F-measures of ROUGE (words) and chrF (characters), 0 to 1, with bootstrap intervals."""

    rouge1: Estimate
    rouge2: Estimate
    rougeL: Estimate  # noqa: N815 - the name the field uses
    chrf: Estimate | None = None
    mean_tokens: float
    truncated: int
    """Answers cut off at the limit of new tokens."""
    cut_in_thoughts: int = 0
    missing: int = 0
    """Prompts without an answer."""


class TrivialBaselines(Record):
    """Scores of trivial baselines, which a useful model must beat."""

    echoed_prompt: Estimate
    other_answer: Estimate
    polite_sentence: Estimate


class MeanComparison(PairedTest):
    """Means over the examples that both models have: random sign flips of the differences."""

    examples: int


class LossComparison(MeanComparison):
    """Mean losses of the responses, by example."""

    lower_is_better: ClassVar[bool] = True


class StyleTrait(Record):
    """A style trait: the share of answers that contain one of its phrases."""

    name: str
    expected: Share
    """The share among the expected answers."""
    models: dict[str, Share]
    comparison: Comparison | None


class Dialogue(Record):
    examples: int
    truncated_prompts: int = 0
    """Prompts that lost their beginning, to fit `evals.max_prompt_tokens`."""
    max_new_tokens: int
    models: dict[str, DialogueScore]
    nulls: TrivialBaselines
    """ROUGE-L of the trivial baselines, under their public name."""
    chrf_nulls: TrivialBaselines | None = None
    comparison: MeanComparison
    markers: list[StyleTrait] = []
    reference_comparison: MeanComparison | None = None
    """The reference compared with the fine-tuned model, if it answered."""


class LossScore(Record):
    """Cross-entropy of the held-out responses, in nats per token."""

    mean: float
    """Over all tokens; its exponential is the perplexity."""
    by_example: Estimate
    """Mean of the examples' means: each example counts as much."""


class HeldOutLoss(Record):
    examples: int
    tokens: int
    """Tokens of the responses."""
    models: dict[str, LossScore]
    lower: Share
    """Examples whose loss fell."""
    comparison: LossComparison


class HarnessResult(Record):
    """A task of lm-evaluation-harness."""

    name: str
    task: str
    metric: str
    samples: int
    truncated: int
    models: dict[str, float]
    """Mean of the metric; of perplexities, the mean log-likelihood of a word or byte."""
    comparison: Comparison | MeanComparison


class SideBySide(Record):
    id: str
    prompt: str
    expected: str | None
    answers: dict[str, str]


class Evaluation(Record):
    multiple_choice: list[MultipleChoiceResult]
    harness: list[HarnessResult] = []
    dialogue: Dialogue | None
    loss: HeldOutLoss | None = None
    side_by_side: list[SideBySide]
    side_by_side_truncated_prompts: int = 0


class ReferenceTokens(Record):
    prompt: int
    completion: int
    """Tokens of the answers, reasoning included."""
    reasoning: int = 0


class ReferenceResult(Record):
    model: str | None
    provider: list[str]
    local: Literal[False] = False
    requests: int
    failed: int
    lost: int = 0
    """Requests whose reply was lost; they may be billed on top of `cost_usd`."""
    tokens: ReferenceTokens
    cost_usd: float
    status: Literal["complete", "partial", "failed", "skipped"]
    reason: str | None
    """The reason why it is not complete."""


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
