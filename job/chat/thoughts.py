"""Thoughts of reasoning models, which come off a text before it counts as an answer.

Markers are those of Qwen and DeepSeek, Mistral, Cohere, and Gemma 4 (its thought channel).
"""

import re

_OPEN = r"<think>|\[THINK\]|<\|START_THINKING\|>|<\|channel>(?:thought\b)?"
_MARKER = re.compile(rf"({_OPEN})|</think>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>")


def marks_thoughts(token: str) -> bool:
    """Tell whether a token begins or ends what a model thinks before it answers."""
    return bool(_MARKER.fullmatch(token))


def split_thoughts(text: str, prompt: str = "") -> tuple[str, str | None]:
    """Return thoughts and the answer, which is None if the text ends inside its thoughts.

    A chat template may have opened the thoughts: where the end of the prompt shows it, or where
    the text has a lone closing marker. A text without markers is the answer, unchanged.
    """
    opened = re.search(rf"(?:{_OPEN})\s*$", prompt)
    first, *rest = _MARKER.split((opened[0] if opened else "") + text)
    if not rest:
        return "", text
    thoughts, answer, inside = [""], [first], False
    for opening, piece in zip(rest[::2], rest[1::2], strict=True):
        if not opening and not inside:
            thoughts, answer = thoughts + answer, []
        inside = bool(opening)
        (thoughts if inside else answer).append(piece)
    return (_join(answer + thoughts), None) if inside else (_join(thoughts), _join(answer))


def _join(pieces: list[str]) -> str:
    return "\n".join(filter(None, map(str.strip, pieces)))
