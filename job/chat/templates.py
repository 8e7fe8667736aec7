"""Chat templates: how a prompt is wrapped for a model, and how text is kept from being markup.

Text of users and answers is neutralised before it is wrapped: a control token written inside
it (`<end_of_turn>` in a patient's message) is broken by a space, so that it cannot end a turn
or begin another. The templates follow the models' own documentation.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CONTROL_PATTERN = (
    r"<(?:bos|eos|pad|unk|mask|s|/s|start_of_turn|end_of_turn|start_of_image|end_of_image|"
    r"image_soft_token|img|unused\d+|end_of_utterance)>"
    r"|<\|[^<>|\s]{1,40}\|?>|<[^<>|\s]{1,40}\|>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|multimodal)\]"
    r"|<</?SYS>>"
)
"""The control tokens of the known chat formats, as a regular expression (of Python and RE2)."""


_CONTROL = re.compile(CONTROL_PATTERN)


def neutralize(text: str) -> str:
    """`text` with every control token of the known chat formats broken by a space."""
    while True:
        broken = _CONTROL.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        if broken == text:
            return text
        text = broken  # breaking one token may lay another bare, like <|[INST]|>


@dataclass(frozen=True)
class ChatTemplate:
    """A prompt is `before + text + after`, a response is followed by `stop`.

    `stop` is the token that ends the model's turn, or None where that is the tokenizer's
    end-of-sequence token.
    """

    name: Literal["gemma", "plain"]
    before: str
    after: str
    stop: str | None
    between: str = ""
    """Stands between the end of an answer and the next turn."""

    def prompt(self, prompt: str, system: str | None = None) -> str:
        """The text a model is given before it answers.

        Gemma has no system role; its documentation puts the instruction at the beginning of
        the user's turn (https://ai.google.dev/gemma/docs/core/prompt-structure).
        """
        text = neutralize(prompt).strip()
        if system:
            text = f"{neutralize(system).strip()}\n\n{text}"
        return f"{self.before}{text}{self.after}"

    def turns(
        self, prompt: str, system: str | None = None, history: Sequence[tuple[str, str]] = ()
    ) -> list[str]:
        """The texts before each answer of a dialogue; the answers before go between them.

        Returns:
            One more text than `history` has pairs of prompt and response.
        """
        prompts = [*(said for said, _ in history), prompt]
        first, *later = prompts
        return [self.prompt(first, system), *(self.between + self.prompt(text) for text in later)]

    def dialogue(
        self, prompt: str, system: str | None = None, history: Sequence[tuple[str, str]] = ()
    ) -> list[str]:
        """All that a model is given before it answers: prompts and answers in turn."""
        texts = self.turns(prompt, system, history)
        for place, (_, answer) in enumerate(history):
            texts.insert(2 * place + 1, neutralize(answer))
        return texts

    @property
    def tokens(self) -> tuple[str, ...]:
        """The control tokens a tokenizer must have for this template to work."""
        return tuple(dict.fromkeys(_CONTROL.findall(self.before + self.after + (self.stop or ""))))


TEMPLATES: dict[str, ChatTemplate] = {
    "gemma": ChatTemplate(
        "gemma",
        before="<start_of_turn>user\n",
        after="<end_of_turn>\n<start_of_turn>model\n",
        stop="<end_of_turn>",
        between="\n",
    ),
    "plain": ChatTemplate("plain", before="", after="\n", stop=None),
}
