"""Which letter a generated answer chose, or that it chose none. Nothing is ever guessed.

The rules, in order; the first that applies decides:
1. The whole answer is the text of exactly one option.
2. The answer begins with a lone letter: `B`, `(b)`, `B.`, `B) because`, `**B**`, `B - text`. A
   letter followed by a plain word needs punctuation between, so the article in `A common
   cause is` is no answer; nor is a letter joined to another (`B, C`, `(A) and (B)`), nor the
   first of several lines that begin so (the options repeated).
   Or a phrase names it: `the answer is B`, `answer: (C)`, `correct option is D`, `I choose A`.
   If beginning and phrases name different letters, there is no answer.
3. Exactly one letter is said to be it: `it is D`, `so, C`, `D is correct`. A letter that only
   occurs (`hepatitis B`, `vitamin D is low`) is none.
4. The text of exactly one option occurs in the answer.
What is negated (`not B`, `B is wrong`, `neither A nor B`, `not aspirin`) is never chosen.
"""

import re
from collections.abc import Sequence

from job.spec.fields import LETTERS

_MARKUP = re.compile(r"[*_`#>$]+|\\boxed\{|\}")


_OPEN, _CLOSE = r"[\(\[\"'‘“]", r"[\)\]\"'’”]"


_LEADING = re.compile(
    rf"{_OPEN}?([A-Za-z])(?:{_CLOSE}+[.:,;]*|[.:,;](?=\s|$)|\s*$|\s*\n|\s+[-–—]\s)"
)


_JOINED = re.compile(rf"^\s*(?:,|/|&|and\b|or\b|nor\b)+\s*(?:and\s+|or\s+)?{_OPEN}?[A-Z](?![\w'’])")


_PHRASE = re.compile(
    r"(?i:\b(?:answer|choice|option|choose|select|pick|chose|go with)\b"
    r"(?:\s+(?:is|would\s+be|will\s+be|should\s+be|choice|option|letter|answer|the|correct|right))*)"
    rf"\s*[:=-]?\s*{_OPEN}?([A-Za-z])(?![\w'’])"
)


_CONNECTIVES = r"(?:because|since|as|is|was|for|due|which|and|or|nor|but|given|based|seems|would)\b"


_ARTICLE = re.compile(rf"^\s+(?!{_CONNECTIVES})[a-z]")


_SAID_BEFORE = re.compile(
    r"(?:\b(?:is|be|so|therefore|thus|hence|but|then)\b[,:]?|[=:])\s*$", re.IGNORECASE
)


_ENDS = re.compile(rf"^{_CLOSE}*\s*(?:[.,;:!?]|$|\b(?:because|since|as|not|rather)\b)")


_STARTS = re.compile(r"(?:^|[.!?:;,\n]|\b(?:so|that|option|choice|letter))\s*$", re.IGNORECASE)


_SAID_AFTER = re.compile(
    rf"^{_CLOSE}*\s+"
    r"(?:is\s+(?:the\s+)?(?:correct|right|best|true|answer|most likely)|rather than)\b",
    re.IGNORECASE,
)


_NEGATED_BEFORE = re.compile(
    r"(?:\bnot|n['’]t|\bcannot|\bnever|\bneither|\bnor|\bwithout|\brather than|\binstead of|"
    r"\bexcept|\bexclud\w*|\brul\w* out|\beliminat\w*)\s+"
    rf"(?:be\s+|choose\s+|option\s+|answer\s+|choice\s+|the\s+)*{_OPEN}?$",
    re.IGNORECASE,
)


_NEGATED_AFTER = re.compile(
    rf"^(?:{_CLOSE}|[.:])*\s*(?:(?:is|are|was|would be|can be|must be)\s+(?:an?\s+|the\s+)?)?"
    r"(?:not\b|isn['’]t|aren['’]t|wasn['’]t|cannot|can['’]t|never\b|wrong|incorrect|false|"
    r"excluded|eliminated|ruled out|nor\b)",
    re.IGNORECASE,
)


def parse_choice(answer: str, options: Sequence[str]) -> str | None:
    """The letter that `answer` chooses among the options, or None.

    Args:
        answer: what the model wrote.
        options: texts of the options; the first is A.
    """
    letters = LETTERS[: len(options)]
    text = _MARKUP.sub("", answer).strip()
    exact = [
        letter
        for letter, option in zip(letters, options, strict=True)
        if _folded(option) == _folded(text)
    ]
    if len(exact) == 1:
        return exact[0]
    bare = _without_options(text, options)
    stated = _leading(bare, letters) | _phrased(bare, letters)
    for named in (stated, _said(bare, letters)):
        if named:
            return named.pop() if len(named) == 1 else None
    return _quoted(text, letters, options)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _without_options(text: str, options: Sequence[str]) -> str:
    """The text without those options that hold a letter of their own, like `Vitamin C`."""
    for option in sorted(options, key=len, reverse=True):
        if len(option) > 1 and re.search(r"(?<!\w)[A-Z](?!\w)", option):
            text = re.sub(rf"(?<!\w){re.escape(option)}(?!\w)", "…", text, flags=re.IGNORECASE)
    return text


def _leading(text: str, letters: str) -> set[str]:
    match = _LEADING.match(text)
    lines = [_LEADING.match(line.strip()) for line in text.splitlines()]
    if len({line[1].upper() for line in lines if line and line[1].upper() in letters}) > 1:
        return set()
    if not match or match[1].upper() not in letters:
        return set()
    if _JOINED.match(text[match.end(1) :].lstrip(")]\"'")) or _negated(text, *match.span(1)):
        return set()
    return {match[1].upper()}


def _phrased(text: str, letters: str) -> set[str]:
    named = set()
    for match in _PHRASE.finditer(text):
        letter, rest = match[1], text[match.end(1) :]
        if letter.upper() not in letters or _negated(text, *match.span(1)):
            continue
        if letter.islower() and not re.match(rf"{_CLOSE}|[.,;:]|\s*$", rest):
            continue
        if letter == "A" and _ARTICLE.match(rest):
            continue
        named.add(letter.upper())
        if joined := _JOINED.match(re.sub(rf"^{_CLOSE}+", "", rest)):
            named.add(joined[0][-1])
    return named


def _said(text: str, letters: str) -> set[str]:
    return {
        match[1]
        for match in re.finditer(rf"(?<![\w'’-]){_OPEN}?([{letters}])(?![\w'’-])", text)
        if (
            (_SAID_BEFORE.search(text[: match.start()]) and _ENDS.match(text[match.end(1) :]))
            or (_STARTS.search(text[: match.start()]) and _SAID_AFTER.match(text[match.end(1) :]))
        )
        and not _negated(text, *match.span(1))
        and not _JOINED.match(text[match.end(1) :])
    }


def _negated(text: str, start: int, end: int) -> bool:
    return bool(_NEGATED_BEFORE.search(text[:start]) or _NEGATED_AFTER.match(text[end:]))


def _quoted(text: str, letters: str, options: Sequence[str]) -> str | None:
    folded = _folded(text)
    found = []
    for letter, option in zip(letters, options, strict=True):
        words = _folded(option)
        spans = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", folded)]
        if words and any(not _negated(folded, *span) for span in spans):
            found.append((letter, words))
    # An option whose text lies within another's that also occurs was not itself named.
    kept = [a for a in found if not any(a[1] != b[1] and a[1] in b[1] for b in found)]
    return kept[0][0] if len(kept) == 1 else None
