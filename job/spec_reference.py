"""The `reference` section of the spec: the larger remote model, and what asking it may cost."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from job.spec_data import Section
from job.spec_types import Number, Positive

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
