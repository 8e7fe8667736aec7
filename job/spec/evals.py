"""The `evals` and `reference` sections of the spec: questions, scoring and the remote model."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from job.spec.data import Section, Source
from job.spec.fields import (
    LM_EVAL,
    Name,
    Number,
    Positive,
    QuestionPrompt,
    Template,
    template_fields,
)

Phrase = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
QUESTION_PROMPT = "{question}\n\n{options}\n\nAnswer with the letter of the right option only."


class FewShot(Section):
    """Solved questions before each question, from the same dataset."""

    examples: Annotated[int, Field(ge=1, le=64, strict=True)] = Field(
        description="Number of solved questions, the first valid ones; never the question itself."
    )
    split: str | None = Field(
        None, description="Split of the solved questions; unset: the questions' split."
    )
    data_files: list[str] | None = Field(
        None, description="Files of the solved questions; unset: the questions' files."
    )


Role = Literal["target", "retention"]
_ROLE = "target asks whether tuning helped, retention whether it broke anything."
_MARGIN = "Drop of the score, as a share, that retention accepts."


class MultipleChoiceEval(Source):
    name: Name = Field(description="Name of the task in results.json and evals/<model>/<name>/.")
    scoring: Literal["letters", "generate"] = Field(
        "letters",
        description="letters: compare the logits of the letters after one forward pass; generate: "
        "greedy decoding and a parser, which knows English best.",
    )
    question: Template = Field("{question}", description="Text of the question.")
    options: Annotated[list[str], Field(min_length=2, max_length=26)] | str = Field(
        description="Columns of the options in order, or one column with a list of them, with or "
        "without labels: [{key, value}], {text: [...], label: [...]} or {A: ..., B: ...}."
    )
    answer: str = Field(description="Column of the correct option.")
    answer_is: Literal["auto", "index", "number", "letter", "text"] = Field(
        "auto",
        description="Form of `answer`: 0-based index, 1-based number, letter or the option's "
        "text; auto: the only form, or label, that reads the complete column.",
    )
    shuffle_options: bool = Field(
        False,
        description="Whether to shuffle the options, always in the same order for the same "
        "question; for datasets whose right option has a fixed place.",
    )
    id: str | None = Field(None, description="Column of the id; unset: the row number.")
    group: str | None = Field(
        None, description="Column to report accuracy by, such as the subject."
    )
    prompt: QuestionPrompt = Field(
        QUESTION_PROMPT,
        description="Text of the user's turn, with {question} and {options}. lm-eval: prompt and "
        "scoring of lm-evaluation-harness's MedMCQA, without a chat turn.",
    )
    few_shot: FewShot | None = Field(
        None, description="Solved questions before each question; unset: none (zero-shot)."
    )
    limit: Positive | None = Field(None, description="Use the first N questions; unset: all.")
    role: Role = Field("target", description=_ROLE)
    margin: Annotated[float, Field(gt=0, lt=1)] = Field(0.01, description=_MARGIN)
    max_new_tokens: Positive = Field(16, description="Maximum tokens of a generated answer.")

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
    examples: Annotated[int, Field(ge=2, strict=True)] | None = Field(
        None,
        description="Held-out examples to answer; unset: all, up to 200.",
    )
    max_new_tokens: Positive = Field(
        128, description="Maximum tokens of an answer; ROUGE depends on it."
    )
    markers: dict[str, Annotated[list[Phrase], Field(min_length=1)]] = Field(
        MARKERS,
        description="Style traits to count: lists of phrases by name, any of which counts. Phrases "
        "match complete words, ignoring case; # matches a number; {} counts none.",
    )

    @property
    def max_examples(self) -> int:
        """Maximum number of held-out examples to answer."""
        return self.examples or 200


class HarnessEval(Section):
    name: Name = Field(description="Name of the task in results.json and evals/<model>/<name>/.")
    task: str = Field(min_length=1, description="A task or group of lm-evaluation-harness.")
    include: str | None = Field(None, description="Folder with task files of your own.")
    metric: str | None = Field(None, description="Metric of the task; unset: its first.")
    few_shot: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None, description="Number of solved examples; unset: as the task says."
    )
    limit: Positive | None = Field(None, description="Use the first N samples; unset: all.")
    chat_template: bool = Field(
        False, description="Whether its prompts are rendered by the model's chat template."
    )
    role: Role = Field("retention", description=_ROLE)
    margin: Annotated[float, Field(gt=0, lt=1)] = Field(0.01, description=_MARGIN)


class SideBySideEval(Section):
    examples: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None,
        description="Held-out prompts to show with every model's answer; unset: up to 4.",
    )
    prompts: list[str] = Field([], description="Additional prompts.")
    max_new_tokens: Positive = Field(128, description="Maximum tokens of an answer.")

    @property
    def max_examples(self) -> int:
        """Maximum number of held-out prompts to show."""
        return 4 if self.examples is None else self.examples


class Evals(Section):
    batch_size: Positive = Field(16, description="Per-device batch size of prompts.")
    max_prompt_tokens: Positive = Field(
        1024, description="Longer prompts lose their beginning; they are counted as truncated."
    )
    max_truncated_share: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.05,
        description="Share of an evaluation's prompts that may be truncated; with more, the run "
        "stops.",
    )
    bootstrap_samples: Annotated[int, Field(ge=100, strict=True)] = Field(
        2000, description="Random resamples per interval."
    )
    multiple_choice: list[MultipleChoiceEval] = Field([], description="Multiple-choice tasks.")
    harness: list[HarnessEval] = Field(
        [], description="Tasks of lm-evaluation-harness (extra `harness`)."
    )
    dialogue: DialogueEval | None = Field(
        DialogueEval(), description="ROUGE on held-out examples; null: none."
    )
    side_by_side: SideBySideEval = Field(
        SideBySideEval(), description="Answers of all models side by side, to read."
    )

    @model_validator(mode="after")
    def _unique_names(self) -> Self:
        names = [entry.name for entry in self.multiple_choice]
        names += [entry.name for entry in self.harness]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two evaluations are named '{name}'; rename one")
            if name in ("dialogue", "side_by_side", "loss"):
                raise ValueError(f"'{name}' is the name of another evaluation; rename the entry")
        return self


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class Reference(Section):
    model: str = Field(min_length=1, description="Model name at the endpoint.")
    base_url: str = Field(
        "https://openrouter.ai/api/v1",
        description="URL of an OpenAI-compatible API, including its version.",
    )
    api: Literal["auto", "openrouter", "openai"] = Field(
        "auto",
        description="API extensions to use; auto: OpenRouter's at openrouter.ai, otherwise none. "
        "OpenRouter requests require providers that support every parameter sent.",
    )
    evals: list[str] | None = Field(
        None,
        description="Names of the multiple-choice tasks to answer; unset: those with `scoring: "
        "generate`.",
    )
    dialogue: bool = Field(
        False, description="Also answer the held-out dialogues of evals.dialogue."
    )
    max_tokens: Positive = Field(
        1024, description="Maximum tokens of an answer, reasoning included."
    )
    reasoning: Effort | None = Field(
        "none",
        description="Reasoning effort. null: the model's default, for models without this "
        "parameter; `none` is sent to OpenRouter only.",
    )
    max_usd: Annotated[Number, Field(gt=0)] | None = Field(
        None,
        description="Budget of the run in USD; requests stop before it is exceeded. Needs an API "
        "that reports the cost of a request, like OpenRouter. null: no limit.",
    )
    timeout_seconds: Annotated[Number, Field(gt=0)] = Field(
        120, description="Timeout of a request in seconds."
    )
    attempts: Positive = Field(
        5, description="Attempts per request before its answer counts as missing."
    )
    concurrency: Annotated[int, Field(ge=1, le=64, strict=True)] = Field(
        4, description="Concurrent requests."
    )

    @model_validator(mode="after")
    def _http(self) -> Self:
        if not re.match(r"https?://[^/@]+(/|$)", self.base_url):
            shown = re.sub(r"//[^/@]*@", "//[redacted]@", self.base_url)
            raise ValueError(
                f"`base_url` must be an http(s) address without credentials; got {shown!r}"
            )
        return self

    @property
    def is_openrouter(self) -> bool:
        """Whether the endpoint has OpenRouter's extensions."""
        if self.api != "auto":
            return self.api == "openrouter"
        host = re.sub(r"^https?://|[:/].*$", "", self.base_url)
        return host == "openrouter.ai" or host.endswith(".openrouter.ai")
