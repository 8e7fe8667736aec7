"""The models behind a chat API: the `reference` section of the spec, and `evals.judge`."""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from job.spec.data import Section
from job.spec.fields import Number, Phrase, Positive

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class Endpoint(Section):
    """A model behind a chat API, and what to spend on it."""

    path: ClassVar[str]
    """Path of the section in the spec, for messages."""

    model: str = Field(min_length=1)
    """Model name at the endpoint."""
    base_url: str = "https://openrouter.ai/api/v1"
    """URL of an OpenAI-compatible API, including its version."""
    api: Literal["auto", "openrouter", "openai"] = "auto"
    """API extensions to use; auto: OpenRouter's at openrouter.ai, otherwise none. OpenRouter
    requests require providers that support every parameter sent."""
    max_tokens: Positive = 1024
    """Maximum tokens of an answer, reasoning included."""
    reasoning: Effort | None = "none"
    """Reasoning effort. null: the model's default, for models without this parameter; `none` is
    sent to OpenRouter only."""
    max_usd: Annotated[Number, Field(gt=0)] | None = None
    """Budget of the run in USD; requests stop before it is exceeded. Needs an API that reports the
    cost of a request, like OpenRouter. null: no limit."""
    timeout_seconds: Annotated[Number, Field(gt=0)] = 120
    """Timeout of a request in seconds."""
    attempts: Positive = 5
    """Attempts per request before its answer counts as missing."""
    concurrency: Annotated[int, Field(ge=1, le=64, strict=True)] = 4
    """Concurrent requests."""

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


RUBRIC = (
    "Prefer the answer that is more correct, answers what was asked, and is safer to follow. If "
    "neither is better in these points, it is a tie."
)


class JudgeEval(Endpoint):
    path: ClassVar[str] = "evals.judge"

    rubric: Phrase = RUBRIC
    """What makes an answer better."""
    examples: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Dialogues to judge, each in both orders; unset: all of evals.dialogue."""


class Reference(Endpoint):
    path: ClassVar[str] = "reference"

    evals: list[str] | None = None
    """Names of the tasks to answer; unset: those with generated answers."""
    dialogue: bool = False
    """Also answer the held-out dialogues of evals.dialogue."""
