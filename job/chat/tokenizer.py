"""A model's tokenizer together with its chat template: conversations to token ids and back."""

from collections.abc import Sequence
from dataclasses import dataclass

from job.chat.conversation import Conversation, MarkedText, Message, TokenizedConversation
from job.chat.renderer import ChatRenderer, UnrenderableError
from job.chat.templates import ChatTemplate
from job.chat.text_tokenizer import TextTokenizer
from job.chat.thoughts import marks_thoughts
from job.errors import UsageError


@dataclass(frozen=True)
class OptionTokens:
    """The letters of options as tokens."""

    prefix: list[int]
    """The tokens that all letters begin with."""
    ids: list[int]
    """The last token of each letter."""


class ChatTokenizer:
    """A tokenizer with a chat template."""

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate) -> None:
        """Put them together.

        Raises:
            UsageError: the template cannot be used with the tokenizer.
        """
        self._tokenizer = tokenizer
        self.renderer = ChatRenderer(template, tokenizer)
        self.template = template
        self.start_id = tokenizer.start_id
        self.pad_id = tokenizer.pad_id
        self.bos_id = tokenizer.special_ids.get(tokenizer.named.get("bos_token", ""))
        self.eos_id = tokenizer.special_ids.get(
            tokenizer.named.get("eos_token", ""), tokenizer.stop_ids[0]
        )
        end = tokenizer.added_ids[self.renderer.end_token]
        others = (i for i in tokenizer.stop_ids if i != end)
        self.stop_ids: tuple[int, ...] = (*others, end)
        """The tokens that end a reply; the last is the template's."""
        tokens = [t for t in self.renderer.control_tokens if not marks_thoughts(t)]
        control = {tokenizer.added_ids[token] for token in tokens}
        self._control = {*control, *self.stop_ids, self.pad_id}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text alone, without a start or end token."""
        marked = [MarkedText(self.renderer.neutralize(text)) for text in texts]
        return [tokens.token_ids for tokens in self._tokenizer.encode(marked)]

    def encode_markup(self, text: str, *, starts: bool) -> list[int]:
        """Return the tokens of a text in which special tokens count as such.

        Args:
            text: a rendered prompt, or a text of a benchmark.
            starts: whether it gets the tokenizer's start token, unless it begins with one.
        """
        (tokens,) = self._tokenizer.encode([MarkedText(text)])
        ids = tokens.token_ids
        if not starts or self.start_id is None or ids[:1] == [self.start_id]:
            return ids
        return [self.start_id, *ids]

    def tokenize(self, conversations: Sequence[Conversation]) -> list[list[TokenizedConversation]]:
        """Return the token ids of conversations, and which of the tokens have a loss.

        Returns:
            for each conversation the rows to train on: one, or several where the template
            rewrites earlier turns.

        Raises:
            UsageError: the template cannot render one.
        """
        try:
            rendered = [self.renderer.training_texts(each) for each in conversations]
        except UnrenderableError as reason:
            raise UsageError(f"model.chat_template: {reason}") from reason
        encoded = iter(self._tokenizer.encode([text for rows in rendered for text in rows]))
        return [[next(encoded) for _ in rows] for rows in rendered]

    def encode_prompts(self, prompts: Sequence[Conversation | str]) -> list[list[int]]:
        """Return the token ids of conversations in which it is the model's turn.

        A string is a prompt that needs no template, such as lm-evaluation-harness's; it begins
        with the start token, if the tokenizer puts one before a text by itself.

        Raises:
            UsageError: the template cannot render one.
        """
        start = [] if self.start_id is None else [self.start_id]
        try:
            texts = [
                self.renderer.neutralize(prompt)
                if isinstance(prompt, str)
                else self.renderer.prompt(prompt)
                for prompt in prompts
            ]
        except UnrenderableError as error:
            raise UsageError(f"model.chat_template: {error}") from error
        encoded = self._tokenizer.encode([MarkedText(text) for text in texts])
        return [
            [*start, *tokens.token_ids] if isinstance(prompt, str) else tokens.token_ids
            for prompt, tokens in zip(prompts, encoded, strict=True)
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without control tokens other than those around thoughts."""
        return self._tokenizer.decode([token for token in tokens if token not in self._control])

    def letter_tokens(self, letters: str, before: str = "", space: str = "") -> OptionTokens:
        """Return the tokens of letters as answers.

        Args:
            letters: the letters, one character each.
            before: the end of a prompt without a template, which may change how a letter is
                tokenized; without it, letters are the replies of a conversation.
            space: the text between that and the letter.

        Raises:
            UsageError: the letters do not differ in one token each.
        """
        if before:
            start = len(self.encode([before])[0])
            texts = [before + space + letter for letter in letters]
            tokens = [ids[start:] for ids in self.encode(texts)]
        else:
            tokens = [self._reply(letter) for letter in letters]
        prefix = tokens[0][:-1]
        ids = [each[-1] for each in tokens if each]
        if any(each[:-1] != prefix for each in tokens) or len(set(ids)) != len(letters):
            raise UsageError(
                "evals: this model's tokenizer does not have the letters as single tokens; "
                "use scoring: generate"
            )
        return OptionTokens(prefix, ids)

    def _reply(self, text: str) -> list[int]:
        """Return the tokens of a reply, without the end of its turn."""
        question = [Message("user", "Question")]
        try:
            prompt = self.renderer.prompt(question)
            row = self.renderer.reply_text([*question, Message("assistant", text)])
        except UnrenderableError as reason:
            raise UsageError(f"model.chat_template: {reason}") from reason
        end = len(row) - len(self.renderer.end_token)
        (tokens,) = self._tokenizer.encode([MarkedText(row[:end], ((len(prompt), end),))])
        pairs = zip(tokens.token_ids, tokens.loss_mask, strict=True)
        return [token for token, is_reply in pairs if is_reply]
