"""Text to tokens and back, for one model: its tokenizer, its chat template, its stop tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from job.chat.templates import TEMPLATES, ChatTemplate
from job.errors import UsageError


@dataclass(frozen=True)
class OptionTokens:
    """The letters of options as tokens: what all of them begin with, and the one each ends in."""

    shared: list[int]
    ids: list[int]


class ChatTokenizer:
    """A KerasHub tokenizer and a chat template as one thing.

    A prompt and a response are tokenized apart and joined, so that training sees the very
    tokens that evaluation gives the model.
    """

    def __init__(self, tokenizer: Any, template: str = "auto") -> None:
        self._tokenizer = tokenizer
        self.template = choose_template(tokenizer, template)
        self.start_id: int | None = getattr(tokenizer, "start_token_id", None)
        self.end_id: int = tokenizer.end_token_id
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id: int = self.end_id if pad is None else pad
        control = {int(tokenizer.token_to_id(token)) for token in self.template.tokens}
        self._control = control | {self.start_id, self.end_id, self.pad_id}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        if self.template.stop is None:
            return (self.end_id,)
        return (self.end_id, int(self._tokenizer.token_to_id(self.template.stop)))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, as it is: nothing is put before or after."""
        if not texts:
            return []
        return [[int(token) for token in tokens] for tokens in self._tokenizer(list(texts))]

    def encode_prompts(self, prompts: Sequence[str | Sequence[str]]) -> list[list[int]]:
        """Tokens of prompts that the template has wrapped, with the start token first.

        A prompt may be a list of texts, each tokenized apart: prompts and answers in turn.
        """
        start = [] if self.start_id is None else [self.start_id]
        texts = [[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]
        encoded = iter(self.encode([piece for pieces in texts for piece in pieces]))
        made = []
        for pieces in texts:
            tokens = list(start)
            for place in range(len(pieces)):
                tokens += next(encoded)
                if place % 2:
                    tokens.append(self.stop_ids[-1])
            made.append(tokens)
        return made

    def encode_responses(self, responses: Sequence[str]) -> list[list[int]]:
        """Tokens of responses, with the token that ends the turn last."""
        return [[*tokens, self.stop_ids[-1]] for tokens in self.encode(responses)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""
        kept = [token for token in tokens if token not in self._control]
        return str(self._tokenizer.detokenize(kept)) if kept else ""

    def letter_tokens(self, letters: str, before: str = "", space: str = "") -> OptionTokens:
        """How the letters are written as answers.

        Args:
            before: the end of the prompt, of which the tokens may depend.
            space: stands between the prompt and the letter.

        Raises:
            UsageError: this tokenizer does not tell the letters apart by one token.
        """
        start = len(self.encode([before])[0]) if before else 0
        tokens = [ids[start:] for ids in self.encode([before + space + each for each in letters])]
        shared = tokens[0][:-1]
        ids = [each[-1] for each in tokens if each]
        if any(each[:-1] != shared for each in tokens) or len(set(ids)) != len(letters):
            raise UsageError(
                "evals: this model's tokenizer does not have the letters as single tokens; "
                "use scoring: generate"
            )
        return OptionTokens(shared, ids)


def choose_template(tokenizer: Any, wanted: str) -> ChatTemplate:
    """The chat template of the spec, or for `auto` the one the tokenizer has the tokens of.

    Raises:
        UsageError: the tokenizer lacks the control tokens of the template asked for.
    """
    vocabulary = set(tokenizer.get_vocabulary())
    gemma = TEMPLATES["gemma"]
    missing = [token for token in gemma.tokens if token not in vocabulary]
    if wanted == "auto":
        return TEMPLATES["plain"] if missing else gemma
    if wanted == "gemma" and missing:
        raise UsageError(
            f"model.chat_template: gemma needs the tokens {', '.join(missing)}, which this "
            "model's tokenizer does not have; use plain or auto"
        )
    return TEMPLATES[wanted]
