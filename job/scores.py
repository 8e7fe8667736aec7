"""The `evaluation` and `reference` parts of `results.json`: scores, and tests between models."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

Interval = tuple[float, float]
Finding = Literal[
    "improved", "worse", "no measurable change", "not enough evidence", "not worse", "cannot tell"
]
"""Of a retention task: not worse, worse, or cannot tell."""


class Record(BaseModel):
    """Base of the parts of the results: immutable, without undeclared fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RowCounts(Record):
    raw: int
    valid: int
    dropped: dict[str, int]


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
    family: Literal["primary", "retention", "judge", "secondary"] = "primary"
    """The first two compare baseline and fine-tuned, and decide the verdict."""
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
    """Rows read and used, and why others were left out; null in results of earlier versions."""
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
    """Prompts that lost their beginning."""
    models: dict[str, float]
    """Mean of the metric; of perplexities, the mean log-likelihood of a word or byte."""
    comparison: Comparison | MeanComparison


class TextScore(Record):
    """One model on one task with free answers."""

    score: Estimate
    unparsed: int
    """Answers in which the metric could read nothing; they score 0."""
    truncated: int
    cut_in_thoughts: int
    missing: int
    macro_f1: Estimate | None = None
    """Of labels: the mean over the labels of their F1."""
    fields: dict[str, Share] = {}
    """Of JSON: answers in which a field is right."""


class TextTaskResult(HarnessResult):
    """A task with free answers; `task` names its dataset."""

    revision: str | None
    rows: RowCounts
    normalization: str
    """What the metric reads and ignores."""
    scores: dict[str, TextScore]
    trivial: dict[str, Estimate]
    """Scores of the most frequent response, the echoed prompt and a shuffled response."""
    trained_prompts: int
    """Prompts that are trained on too."""
    reference_comparison: Comparison | MeanComparison | None


class ReferenceTokens(Record):
    prompt: int = 0
    completion: int = 0
    """Tokens of the answers, reasoning included."""
    reasoning: int = 0


class ReferenceResult(Record):
    model: str | None
    provider: list[str] = []
    local: Literal[False] = False
    requests: int = 0
    failed: int = 0
    lost: int = 0
    """Requests whose reply was lost; they may be billed on top of `cost_usd`."""
    tokens: ReferenceTokens = ReferenceTokens()
    cost_usd: float = 0.0
    status: Literal["complete", "partial", "failed", "skipped"]
    reason: str | None
    """The reason why it is not complete."""


class JudgeResult(Record):
    """A remote model's blind choice between the answers of baseline and tuned model."""

    rubric: str
    examples: int
    wins: int
    """The tuned answer was chosen in both orders, or once beside a tie."""
    losses: int
    ties: int
    contradictions: int
    """The choice followed the position; they count as ties."""
    missing: int
    agreement: Share
    """Examples with the same choice in both orders."""
    longer: Share
    """Wins and losses that went to the longer answer."""
    win_rate: Estimate | None
    """Of the tuned model, ties as half a win; null if nothing was judged."""
    win_rate_same_length: float | None
    """Of wins and losses, as fitted for answers of the same length."""
    comparison: Comparison | None
    doubt: str | None
    """Why the choices show nothing, if so."""
    service: ReferenceResult


class SideBySide(Record):
    id: str
    prompt: str
    expected: str | None
    answers: dict[str, str]


class Evaluation(Record):
    multiple_choice: list[MultipleChoiceResult]
    harness: list[HarnessResult] = []
    tasks: list[TextTaskResult] = []
    dialogue: Dialogue | None
    judge: JudgeResult | None = None
    loss: HeldOutLoss | None = None
    side_by_side: list[SideBySide]
    side_by_side_truncated_prompts: int = 0
