"""Which letter a generated answer chose, or that it chose none. Nothing is ever guessed.

The rules, in order; the first that applies decides:
1. The answer begins with a lone letter: `B`, `(b)`, `B.`, `B) because`, `**B**`. A letter
   followed by a plain word counts only with punctuation between, so the article in
   `A common cause is` is no answer.
2. A phrase names it: `the answer is B`, `answer: (C)`, `correct option is D`, `I choose A`.
   If such phrases name different letters, there is no answer.
3. Exactly one letter stands alone in capitals, not negated (`not B`, `B is wrong`) and not
   the article `A`.
4. The text of exactly one option occurs in the answer.
"""

import re
from collections.abc import Sequence

from job.spec import LETTERS

_MARKUP = re.compile(r"[*_`#>]+")
_PHRASE = re.compile(
    r"\b(?:answer|choice|option|choose|select|pick|chose)\b"
    r"(?:\s+(?:is|would\s+be|will\s+be|should\s+be|choice|option|letter|answer|the|correct|right))*"
    r"\s*[:=-]?\s*[\(\[\"']?([A-Za-z])\b(?!['’][a-z])"
)
_NEGATED_BEFORE = re.compile(
    r"\b(?:not|isn't|rather than|instead of|except|excludes?)\s*(?:option\s*)?[\(\[\"']?$", re.I
)
_NEGATED_AFTER = re.compile(
    r"^[\)\]\"'.:]*\s*(?:(?:is|are|was|would be)\s+)?"
    r"(?:not\b|wrong|incorrect|false|excluded|ruled out)",
    re.I,
)


def parse_choice(answer: str, options: Sequence[str]) -> str | None:
    """The letter that `answer` chooses among the options, or None.

    Args:
        answer: what the model wrote.
        options: texts of the options; the first is A.
    """
    letters = LETTERS[: len(options)]
    text = _MARKUP.sub("", answer).strip()
    for rule in (_leading, _phrased, _alone):
        found = rule(text, letters)
        if found is not None:
            return found or None
    return _quoted(text, letters, options)


def _leading(text: str, letters: str) -> str | None:
    match = re.match(r"[\(\[\"']?([A-Za-z])(?:[\)\]\"'.:,;]|\s*$|\s*[-–—\n])", text)
    if match and match[1].upper() in letters and not _NEGATED_AFTER.match(text[match.end(1) :]):
        return match[1].upper()
    return None


def _phrased(text: str, letters: str) -> str | None:
    named = set()
    for match in _PHRASE.finditer(text):
        letter = match[1]
        rest = text[match.end(1) :]
        article = letter in "Aa" and re.match(r"\s+[a-z]", rest)
        lower_word = letter.islower() and not re.match(r"[\)\]\"'.,;:]|\s*$", rest)
        if letter.upper() not in letters or article or lower_word:
            continue
        if _negated(text, match.start(1), match.end(1)):
            continue
        named.add(letter.upper())
    if not named:
        return None
    return named.pop() if len(named) == 1 else ""


def _alone(text: str, letters: str) -> str | None:
    named = set()
    for match in re.finditer(rf"(?<![\w'’])([{letters}])(?![\w'’])", text):
        article = match[1] == "A" and re.match(r"\s+[a-z]", text[match.end() :])
        if not article and not _negated(text, match.start(), match.end()):
            named.add(match[1])
    if not named:
        return None
    return named.pop() if len(named) == 1 else ""


def _negated(text: str, start: int, end: int) -> bool:
    return bool(_NEGATED_BEFORE.search(text[:start]) or _NEGATED_AFTER.match(text[end:]))


def _quoted(text: str, letters: str, options: Sequence[str]) -> str | None:
    folded = " ".join(text.casefold().split())
    found = []
    for letter, option in zip(letters, options, strict=True):
        words = " ".join(option.casefold().split())
        if words and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", folded):
            found.append((letter, words))
    # An option whose text lies within another's that also occurs was not itself named.
    kept = [a for a in found if not any(a[1] != b[1] and a[1] in b[1] for b in found)]
    return kept[0][0] if len(kept) == 1 else None
