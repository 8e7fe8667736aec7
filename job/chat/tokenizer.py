"""A model's tokenizer together with its chat template: conversations to token ids and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from job.chat.conversation import Conversation, TokenizedConversation
from job.chat.templates import TEMPLATES, ChatTemplate, Piece
from job.errors import UsageError


@dataclass(frozen=True)
class OptionTokens:
    """The letters of options as tokens."""

    prefix: list[int]
    """The tokens that all letters begin with."""
    ids: list[int]
    """The last token of each letter."""


class ChatTokenizer:
    """A KerasHub tokenizer with a chat template.

    Prompts and replies are tokenized separately and joined, so that training sees exactly the
    tokens that evaluation and generation give the model.
    """

    def __init__(self, tokenizer: Any, template: str = "auto") -> None:
        self._tokenizer = tokenizer
        self.template = choose_template(tokenizer, template)
        self.start_id: int | None = getattr(tokenizer, "start_token_id", None)
        self.end_id: int = tokenizer.end_token_id
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id: int = self.end_id if pad is None else pad
        stop = self.template.stop
        self.stop_ids: tuple[int, ...] = (self.end_id,)
        """The tokens that end a reply; the last of them is appended to replies."""
        if stop is not None:
            self.stop_ids = (self.end_id, int(tokenizer.token_to_id(stop)))
        control = {int(tokenizer.token_to_id(token)) for token in self.template.control_tokens}
        self._control = control | {self.start_id, self.end_id, self.pad_id}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text alone, without a start or end token."""
        if not texts:
            return []
        return [[int(token) for token in tokens] for tokens in self._tokenizer(list(texts))]

    def tokenize(
        self, conversations: Sequence[Conversation | str], *, add_generation_prompt: bool = False
    ) -> list[TokenizedConversation]:
        """Return the token ids of conversations, and which of the tokens have a loss.

        Args:
            conversations: messages, which the chat template renders; a string is a prompt that
                needs no template, such as lm-evaluation-harness's.
            add_generation_prompt: end with the start of the model's turn, for it to reply.
        """
        rendered = [
            [Piece(conversation)]
            if isinstance(conversation, str)
            else self.template.render(conversation, add_generation_prompt=add_generation_prompt)
            for conversation in conversations
        ]
        encoded = iter(self.encode([piece.text for pieces in rendered for piece in pieces]))
        tokenized = []
        for pieces in rendered:
            token_ids = [] if self.start_id is None else [self.start_id]
            loss_mask = [False] * len(token_ids)
            for piece in pieces:
                token_ids += next(encoded)
                if piece.ends_turn:
                    token_ids.append(self.stop_ids[-1])
                loss_mask += [piece.has_loss] * (len(token_ids) - len(loss_mask))
            tokenized.append(TokenizedConversation(token_ids, loss_mask))
        return tokenized

    def encode_prompts(self, prompts: Sequence[Conversation | str]) -> list[list[int]]:
        """Return the token ids of conversations in which it is the model's turn."""
        return [t.token_ids for t in self.tokenize(prompts, add_generation_prompt=True)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without control tokens."""
        plain = [token for token in tokens if token not in self._control]
        return str(self._tokenizer.detokenize(plain)) if plain else ""

    def letter_tokens(self, letters: str, before: str = "", space: str = "") -> OptionTokens:
        """Return the tokens of letters as answers.

        Args:
            letters: the letters, one character each.
            before: the end of the prompt, which may change how a letter is tokenized.
            space: the text between the prompt and the letter.

        Raises:
            UsageError: the letters do not differ in one token each.
        """
        start = len(self.encode([before])[0]) if before else 0
        tokens = [ids[start:] for ids in self.encode([before + space + each for each in letters])]
        prefix = tokens[0][:-1]
        ids = [each[-1] for each in tokens if each]
        if any(each[:-1] != prefix for each in tokens) or len(set(ids)) != len(letters):
            raise UsageError(
                "evals: this model's tokenizer does not have the letters as single tokens; "
                "use scoring: generate"
            )
        return OptionTokens(prefix, ids)


def choose_template(tokenizer: Any, name: str) -> ChatTemplate:
    """Return the chat template of the spec; `auto` chooses by the tokenizer's vocabulary.

    Raises:
        UsageError: the tokenizer lacks the control tokens of the template.
    """
    vocabulary = set(tokenizer.get_vocabulary())
    gemma = TEMPLATES["gemma"]
    missing = [token for token in gemma.control_tokens if token not in vocabulary]
    if name == "auto":
        return TEMPLATES["plain"] if missing else gemma
    if name == "gemma" and missing:
        raise UsageError(
            f"model.chat_template: gemma needs the tokens {', '.join(missing)}, which this "
            "model's tokenizer does not have; use plain or auto"
        )
    return TEMPLATES[name]
