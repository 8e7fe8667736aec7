"""The `evals` section of the spec: what is asked, and how answers are scored."""

from typing import Annotated, Any, Literal, Self

import regex
from pydantic import ConfigDict, Field, model_validator

from job.spec.data import ExampleSource, Section, Source
from job.spec.fields import (
    LM_EVAL,
    Dataset,
    Name,
    Number,
    Phrase,
    Positive,
    QuestionPrompt,
    Template,
    template_fields,
)
from job.spec.remote import JudgeEval

QUESTION_PROMPT = "{question}\n\n{options}\n\nAnswer with the letter of the right option only."


class FewShot(Section):
    """Solved questions before each question, from the same dataset."""

    examples: Annotated[int, Field(ge=1, le=64, strict=True)]
    """Number of solved questions, the first valid ones; never the question itself."""
    split: str | None = None
    """Split of the solved questions; unset: the questions' split."""
    data_files: list[str] | None = None
    """Files of the solved questions; unset: the questions' files."""


class TaskEval(Section):
    """A task with one score, which is compared before and after training."""

    name: Name
    """Name of the task in results.json and evals/<model>/<name>/."""
    role: Literal["target", "retention"] = "target"
    """target asks whether tuning helped, retention whether it broke anything."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Drop of the score, as a share, that retention accepts."""


class MultipleChoiceEval(Source, TaskEval):
    scoring: Literal["letters", "generate"] = "letters"
    """letters: compare the logits of the letters after one forward pass; generate: greedy decoding
    and a parser, which knows English best."""
    question: Template = "{question}"
    """Text of the question."""
    options: Annotated[list[str], Field(min_length=2, max_length=26)] | str
    """Columns of the options in order, or one column with a list of them, with or without labels:
    [{key, value}], {text: [...], label: [...]} or {A: ..., B: ...}."""
    answer: str
    """Column of the correct option."""
    answer_is: Literal["auto", "index", "number", "letter", "text"] = "auto"
    """Form of `answer`: 0-based index, 1-based number, letter or the option's text; auto: the only
    form, or label, that reads the complete column."""
    shuffle_options: bool = False
    """Whether to shuffle the options, always in the same order for the same question; for datasets
    whose right option has a fixed place."""
    id: str | None = None
    """Column of the id; unset: the row number."""
    group: str | None = None
    """Column to report accuracy by, such as the subject."""
    prompt: QuestionPrompt = QUESTION_PROMPT
    """Text of the user's turn, with {question} and {options}. lm-eval: prompt and scoring of
    lm-evaluation-harness's MedMCQA, without a chat turn."""
    few_shot: FewShot | None = None
    """Solved questions before each question; unset: none (zero-shot)."""
    limit: Positive | None = None
    """Use the first N questions; unset: all."""
    max_new_tokens: Positive = 16
    """Maximum tokens of a generated answer."""

    @model_validator(mode="after")
    def _prompt_fields(self) -> Self:
        if self.prompt == LM_EVAL:
            if self.scoring != "letters":
                raise ValueError("`prompt: lm-eval` needs `scoring: letters`")
            return self
        fields = set(template_fields(self.prompt))
        if fields != {"question", "options"}:
            raise ValueError("`prompt` must use exactly the fields {question} and {options}")
        return self


MARKERS: dict[str, list[str]] = {
    "asks back": ["?"],
    "hedges": [
        "may", "might", "could be", "possibly", "perhaps", "probably", "it is possible", "likely",
        "seems", "appears to be",
    ],
    "gives a number": ["#"],
}  # fmt: skip
"""Default phrases by style trait."""


class DialogueEval(Section):
    examples: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Held-out examples to answer; unset: all, up to 200."""
    max_new_tokens: Positive = 128
    """Maximum tokens of an answer; ROUGE depends on it."""
    markers: dict[str, Annotated[list[Phrase], Field(min_length=1)]] = MARKERS
    """Style traits to count: lists of phrases by name, any of which counts. Phrases match complete
    words, ignoring case; # matches a number; {} counts none."""

    @property
    def max_examples(self) -> int:
        """Maximum number of held-out examples to answer."""
        return self.examples or 200


class HarnessEval(TaskEval):
    task: str = Field(min_length=1)
    """A task or group of lm-evaluation-harness."""
    include: str | None = None
    """Folder with task files of your own."""
    metric: str | None = None
    """Metric of the task; unset: its first."""
    few_shot: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Number of solved examples; unset: as the task says."""
    limit: Positive | None = None
    """Use the first N samples; unset: all."""
    chat_template: bool = False
    """Whether its prompts are rendered by the model's chat template."""
    role: Literal["target", "retention"] = "retention"
    """target asks whether tuning helped, retention whether it broke anything."""


HELD_OUT = "held-out"
METRICS = ("exact_match", "f1", "regex", "number", "json", "label", "rouge", "chrf")


class TextEval(ExampleSource, TaskEval):
    """A task with free answers, each compared with the expected one."""

    model_config = ConfigDict(json_schema_extra={"required": ["name", "metric"]})

    dataset: Dataset = HELD_OUT
    """Where the prompts and the expected responses are: as `data.dataset`, with `prompt` and
    `response` or `messages`; held-out: the held-out examples."""
    metric: str
    """How an answer is compared with the expected one: exact_match; f1 of words; regex; number: the
    last one; json: share of the fields that are equal; label: a class that it names; rouge; chrf;
    or path/to/file.py:function, a function of your own."""
    pattern: str | None = None
    """Of regex: what to look for; a group in its last match must equal the expected response,
    without a group any match is right."""
    labels: Annotated[list[Phrase], Field(min_length=2)] | None = None
    """Of label: the classes; unset: all expected responses."""
    max_new_tokens: Positive = 128
    """Maximum tokens of an answer."""
    limit: Positive | None = None
    """Use the first N examples; unset: all."""

    @model_validator(mode="before")
    @classmethod
    def _without_templates(cls, given: Any) -> Any:
        if isinstance(given, dict) and (
            given.get("messages") is not None or given.get("dataset", HELD_OUT) == HELD_OUT
        ):
            return {"prompt": None, "response": None} | given
        return given

    def _check_mapping(self) -> None:
        if self.dataset != HELD_OUT:
            super()._check_mapping()
        elif self.prompt or self.response or self.messages or self.system:
            raise ValueError(
                "the held-out examples have their prompts and responses; remove the templates, or "
                "name a `dataset`"
            )
        elif "split" in self.model_fields_set:
            raise ValueError("`split` needs a `dataset`; the held-out examples have none")

    @model_validator(mode="after")
    def _known_metric(self) -> Self:
        if self.function is None and self.metric not in METRICS:
            raise ValueError(
                f"there is no metric '{self.metric}'; write one of {', '.join(METRICS)}, or "
                "path/to/file.py:function"
            )
        if (self.pattern is None) == (self.metric == "regex"):
            raise ValueError("`metric: regex` needs a `pattern`, and only it has one")
        if self.labels is not None and self.metric != "label":
            raise ValueError("`labels` belongs to `metric: label`; remove it")
        if self.pattern is not None:
            try:
                regex.compile(self.pattern)
            except (regex.error, OverflowError, RecursionError) as error:
                raise ValueError(f"`pattern` is not a regular expression: {error}") from error
        return self

    @property
    def function(self) -> tuple[str, str] | None:
        """The file and the name of the user's own metric."""
        path, colon, name = self.metric.rpartition(":")
        return (path, name) if colon and path.endswith(".py") and name.isidentifier() else None


class SideBySideEval(Section):
    examples: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Held-out prompts to show with every model's answer; unset: up to 4."""
    prompts: list[str] = []
    """Additional prompts."""
    max_new_tokens: Positive = 128
    """Maximum tokens of an answer."""

    @property
    def max_examples(self) -> int:
        """Maximum number of held-out prompts to show."""
        return 4 if self.examples is None else self.examples


class Evals(Section):
    batch_size: Positive = 16
    """Per-device batch size of prompts."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts lose their beginning; they are counted as truncated."""
    max_truncated_share: Annotated[Number, Field(ge=0, le=1)] = 0.05
    """Share of an evaluation's prompts that may be truncated; with more, the run stops."""
    bootstrap_samples: Annotated[int, Field(ge=100, strict=True)] = 2000
    """Random resamples per interval."""
    multiple_choice: list[MultipleChoiceEval] = []
    """Multiple-choice tasks."""
    harness: list[HarnessEval] = []
    """Tasks of lm-evaluation-harness (extra `harness`)."""
    tasks: list[TextEval] = []
    """Tasks with free answers, scored by a metric that fits them."""
    dialogue: DialogueEval | None = DialogueEval()
    """ROUGE on held-out examples; null: none."""
    judge: JudgeEval | None = None
    """A remote model's choice between the answers of both models; null: none."""
    side_by_side: SideBySideEval = SideBySideEval()
    """Answers of all models side by side, to read."""

    @model_validator(mode="after")
    def _unique_names(self) -> Self:
        names = [entry.name for entry in (*self.multiple_choice, *self.harness, *self.tasks)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two evaluations are named '{name}'; rename one")
            if name in ("dialogue", "side_by_side", "loss"):
                raise ValueError(f"'{name}' is the name of another evaluation; rename the entry")
        if self.judge is not None and self.dialogue is None:
            raise ValueError(
                "`evals.judge` compares the answers of `evals.dialogue`, which is null; remove one "
                "of them"
            )
        return self
