"""The `evals` section of the spec: what is asked of each model, and how it is scored."""

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
    """Solved questions put before each question, from the same dataset."""

    examples: Annotated[int, Field(ge=1, le=64, strict=True)] = Field(
        description="Solved questions, the first usable ones; a question never sees itself."
    )
    split: str | None = Field(None, description="Split they are from; unset: the questions' own.")
    data_files: list[str] | None = Field(
        None, description="Files they are from, as in the dataset; unset: the questions' own."
    )


class MultipleChoiceEval(Source):
    name: Name = Field(description="Names the slice in results.json and in evals/<model>/<name>/.")
    scoring: Literal["letters", "generate"] = Field(
        "letters",
        description="letters: one forward pass, the letters' logits compared; generate: greedy "
        "decoding and a parser.",
    )
    question: Template = Field("{question}", description="Text of the question.")
    options: Annotated[list[str], Field(min_length=2, max_length=26)] | str = Field(
        description="Columns of the options in order, or the one column that holds their list."
    )
    answer: str = Field(description="Column that names the right option.")
    answer_is: Literal["auto", "index", "number", "letter", "text"] = Field(
        "auto",
        description="How `answer` names it: 0-based index, 1-based number, letter or the option's "
        "text; auto is any but number, where only one of them fits.",
    )
    id: str | None = Field(None, description="Column of the id; unset: the row's number.")
    group: str | None = Field(
        None, description="Column to report accuracy by, such as the subject."
    )
    prompt: QuestionPrompt = Field(
        QUESTION_PROMPT,
        description="The user's turn, with {question} and {options}. lm-eval: the prompt and the "
        "scoring of lm-evaluation-harness's MedMCQA, without a chat turn.",
    )
    few_shot: FewShot | None = Field(
        None, description="Solved questions before each question; unset: none (zero-shot)."
    )
    limit: Positive | None = Field(None, description="First questions to take; unset takes all.")
    max_new_tokens: Positive = Field(16, description="Limit of a generated answer.")

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
    "urges urgent care": [
        "emergency", "urgent care", "urgently", "immediately", "right away", "ambulance",
        "call 911", "as soon as possible", "without delay",
    ],
    "refers to a professional": [
        "consult", "see a doctor", "see your doctor", "your doctor", "a doctor", "physician",
        "specialist", "healthcare provider", "medical professional", "get evaluated",
    ],
    "asks back": ["?"],
    "hedges": [
        "may", "might", "could be", "possibly", "perhaps", "probably", "it is possible", "likely",
        "seems", "appears to be",
    ],
    "gives a number": ["#"],
}  # fmt: skip
"""Phrases by the trait of an answer that they show, where the spec lists none."""


class DialogueEval(Section):
    examples: Annotated[int, Field(ge=2, strict=True)] | None = Field(
        None, description="Held-out examples to answer; unset: all, but at most 200."
    )
    max_new_tokens: Positive = Field(128, description="Limit of an answer; ROUGE depends on it.")
    markers: dict[str, Annotated[list[Phrase], Field(min_length=1)]] = Field(
        MARKERS,
        description="Traits of style to count: phrases by name, any of which shows it. Case does "
        "not count, words are whole, and # stands for a number; {} counts none.",
    )


class SideBySideEval(Section):
    examples: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None, description="Held-out prompts shown with every model's answer; unset: at most 4."
    )
    prompts: list[str] = Field([], description="Further prompts of your own.")
    max_new_tokens: Positive = Field(128, description="Limit of an answer.")


class Evals(Section):
    batch_size: Positive = Field(16, description="Prompts evaluated at once on each device.")
    max_prompt_tokens: Positive = Field(
        1024, description="Longer prompts lose their beginning, and are counted."
    )
    bootstrap_samples: Annotated[int, Field(ge=100, strict=True)] = Field(
        2000, description="Resamples behind each bootstrap interval."
    )
    multiple_choice: list[MultipleChoiceEval] = Field([], description="Slices of questions.")
    dialogue: DialogueEval | None = Field(
        DialogueEval(), description="ROUGE on held-out examples; null leaves it out."
    )
    side_by_side: SideBySideEval = Field(SideBySideEval(), description="Answers to read.")

    @model_validator(mode="after")
    def _unique_names(self) -> Self:
        names = [item.name for item in self.multiple_choice]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two entries of `multiple_choice` are named '{name}'; rename one")
            if name in ("dialogue", "side_by_side"):
                raise ValueError(f"'{name}' is the name of another evaluation; rename the entry")
        return self


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class Reference(Section):
    model: str = Field(min_length=1, description="Model name at the endpoint.")
    base_url: str = Field(
        "https://openrouter.ai/api/v1", description="An OpenAI-compatible API, up to its version."
    )
    api: Literal["auto", "openrouter", "openai"] = Field(
        "auto",
        description="Whose extensions it understands; auto: OpenRouter's at openrouter.ai, none "
        "elsewhere. OpenRouter is asked for providers that support every parameter sent.",
    )
    evals: list[str] | None = Field(
        None,
        description="Names of the multiple-choice slices to ask; unset: those scored by "
        "generation.",
    )
    dialogue: bool = Field(
        False, description="Have it answer the held-out dialogues of evals.dialogue too."
    )
    max_tokens: Positive = Field(1024, description="Limit of an answer, reasoning included.")
    reasoning: Effort | None = Field(
        "none",
        description="Effort of reasoning before the answer. null leaves it to the model, and is "
        "for models that know no such parameter; APIs other than OpenRouter are not told none.",
    )
    max_usd: Annotated[Number, Field(gt=0)] | None = Field(
        None,
        description="Dollars that the run may spend on it; asking stops before. Needs an API "
        "that says what a request cost, as OpenRouter does. null: no limit.",
    )
    timeout_seconds: Annotated[Number, Field(gt=0)] = Field(120, description="Limit of a request.")
    attempts: Positive = Field(5, description="Tries of a request before it counts as missing.")
    concurrency: Annotated[int, Field(ge=1, le=64, strict=True)] = Field(
        4, description="Requests at once."
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
