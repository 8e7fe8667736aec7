"""Text to token ids and back, by the checkpoint's own `tokenizer.json` or by KerasHub.

KerasHub's tokenizers do not split text as those of a transformers checkpoint do: where the
checkpoint has a `tokenizer.json`, the `tokenizers` library reads it.
"""

import bisect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from job.chat.conversation import MarkedText, TokenizedConversation
from job.errors import UsageError

CONTROL_PATTERN = (
    r"<(?:bos|eos|pad|unk|mask|s|/s|start_of_turn|end_of_turn|start_of_image|end_of_image|"
    r"image_soft_token|img|unused\d+|end_of_utterance)>"
    r"|<\|[^<>|\s]{1,40}\|?>|<[^<>|\s]{1,40}\|>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|multimodal)\]"
    r"|<</?SYS>>"
)
"""The control tokens of the known chat formats, as a regular expression (of Python and RE2)."""

CONTROL = re.compile(CONTROL_PATTERN)

_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")

_SPLITS = {
    "Llama3Tokenizer": r"\p{N}{1,3}",
    "SmolLM3Tokenizer": r"\p{N}{1,3}",
    "QwenTokenizer": r"\p{N}",
    "Qwen3Tokenizer": r"\p{N}",
    "QwenMoeTokenizer": r"\p{N}",
    "Qwen3MoeTokenizer": r"\p{N}",
}
"""How KerasHub's byte-pair tokenizers should split digits, by class name."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class FastTokenizer:
    """The `tokenizer.json` of a transformers checkpoint, read as transformers does."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer of a checkpoint's folder.

        Raises:
            UsageError: a file cannot be read.
        """
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(
                f"model.preset: {folder / 'tokenizer.json'} cannot be read: {error}"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = {
            **read_json(folder / "special_tokens_map.json"),
            **read_json(folder / "tokenizer_config.json"),
        }
        listed = config.get("additional_special_tokens") or config.get("extra_special_tokens")
        names = dict.fromkeys((*_NAMES, *(key for key in config if key.endswith("_token"))))
        texts = [_content(token) for token in map(config.get, names)]
        more = [_content(token) for token in listed] if isinstance(listed, list) else []
        known = [t for t in (*texts, *more) if t and self._tokenizer.token_to_id(t) is not None]
        self._tokenizer.add_special_tokens(known)  # as transformers does
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: index for index, token in added.items() if token.special}
        named = {name: text for name, text in zip(names, texts, strict=True) if text in known}
        self.named: Mapping[str, str] = named
        self.special_ids: Mapping[str, int] = special
        self.added_ids: Mapping[str, int] = {t.content: i for i, t in added.items()} | special
        starts = self._tokenizer.encode("").ids
        bos = special.get(named.get("bos_token", ""))
        adds_bos = config.get("add_bos_token")
        adds_bos = bool(starts) and starts[0] == bos if adds_bos is None else adds_bos
        self.start_id = bos if adds_bos else None
        self.stop_ids = _stop_ids(folder, special.get(named.get("eos_token", "")))
        pad = special.get(named.get("pad_token", ""))
        self.pad_id = pad if pad is not None else (self.stop_ids or (0,))[0]

    def encode(self, texts: Sequence[MarkedText]) -> list[TokenizedConversation]:
        """Tokenize texts, special tokens included; the tokens of replies have a loss."""
        encoded = self._tokenizer.encode_batch([t.text for t in texts], add_special_tokens=False)
        return [self._marked(one, text) for one, text in zip(encoded, texts, strict=True)]

    @staticmethod
    def _marked(encoding: Any, text: MarkedText) -> TokenizedConversation:
        starts, mask = [start for start, _ in text.replies], []
        for first, last in encoding.offsets:  # a token that overlaps a reply belongs to it
            at = bisect.bisect_left(starts, max(last, first + 1)) - 1
            mask.append(at >= 0 and first < text.replies[at][1])
        return TokenizedConversation(encoding.ids, mask)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special tokens included."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))


class KerasTokenizer:
    """A KerasHub tokenizer; text is split at special tokens, which it may not know itself."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        digits = _SPLITS.get(type(tokenizer).__name__)
        if digits is not None:
            _split_before_merging(tokenizer, _SPLIT.format(digits=digits))
        own = getattr(tokenizer, "special_tokens", None) or ()
        known = [token for token in tokenizer.get_vocabulary() if CONTROL.fullmatch(token)]
        special = {token: int(tokenizer.token_to_id(token)) for token in {*own, *known}}
        texts = {index: token for token, index in special.items()}
        ends = [getattr(tokenizer, f"{name}_id", None) for name in ("end_token", "end_token2")]
        self.start_id = getattr(tokenizer, "start_token_id", None)
        self.stop_ids = tuple(dict.fromkeys(int(end) for end in ends if end is not None))
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id = self.stop_ids[0] if pad is None else int(pad)
        ids = (self.start_id, self.stop_ids[0], self.pad_id)
        self.named: Mapping[str, str] = {
            n: texts[i] for n, i in zip(_NAMES[:3], ids, strict=True) if i in texts
        }
        self.special_ids: Mapping[str, int] = special
        self.added_ids: Mapping[str, int] = special
        self._special = re.compile(f"({'|'.join(map(re.escape, sorted(special)))})")

    def encode(self, texts: Sequence[MarkedText]) -> list[TokenizedConversation]:
        """Tokenize texts, special tokens included; the tokens of replies have a loss."""
        pieces = [list(self._pieces(text)) for text in texts]
        plain = [piece for row in pieces for piece, _ in row if piece not in self.special_ids]
        encoded = iter(self._tokenizer(plain)) if plain else iter(())
        conversations = []
        for row in pieces:
            token_ids: list[int] = []
            mask: list[bool] = []
            for piece, has_loss in row:
                special = self.special_ids.get(piece)
                token_ids += map(int, next(encoded)) if special is None else [special]
                mask += [has_loss] * (len(token_ids) - len(mask))
            conversations.append(TokenizedConversation(token_ids, mask))
        return conversations

    def _pieces(self, text: MarkedText) -> Iterable[tuple[str, bool]]:
        """Yield the parts of a text, at whose ends it is split, and whether they have a loss."""
        at = 0
        for start, end in (*text.replies, (len(text.text), len(text.text))):
            for part, has_loss in ((text.text[at:start], False), (text.text[start:end], True)):
                yield from ((piece, has_loss) for piece in self._special.split(part) if piece)
            at = end

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special tokens included."""
        return str(self._tokenizer.detokenize(list(token_ids))) if token_ids else ""


TextTokenizer = FastTokenizer | KerasTokenizer
"""A tokenizer without a chat template.

`special_ids` has the id of every special token, and `added_ids` of every token that is recognized
inside text, special or not. `named` has the special tokens with a role, such as `bos_token`, by its
name in chat templates. `start_id` is put before a text, if the tokenizer does that by itself, and
`stop_ids` end a text, as the checkpoint's files name them.
"""


def _split_before_merging(tokenizer: Any, pattern: str) -> None:
    """Make a byte-pair tokenizer split by a pattern, which KerasHub passes as a literal text."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=tokenizer.add_prefix_space, use_regex=False),
    ])  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no such file.

    Raises:
        UsageError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"model.preset: {path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise UsageError(f"model.preset: {path} is not a JSON object")
    return document


def _content(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _stop_ids(folder: Path, eos: int | None) -> tuple[int, ...]:
    """Return the ids that end a text: the tokenizer's, and those to generate with."""
    config = read_json(folder / "config.json")
    config = config.get("text_config") or config
    value = {**config, **read_json(folder / "generation_config.json")}.get("eos_token_id")
    listed = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(end for end in (eos, *listed) if isinstance(end, int)))
