"""Parsing of generated answers to multiple-choice questions: the chosen letter, or none.

An answer that is not clear counts as unparsed; nothing is guessed. What only repeats the format of
the prompt names no letter: options in order (`A: ... B: ... C: ...`), and an `A:` alone, which may
stand for "answer". The first rule that applies decides:
1. The answer is exactly the text of one option.
2. The answer begins with a lone letter: `B`, `(b)`, `B.`, `B) because`, `**B**`, `B - text`. If a
   plain word follows, punctuation must separate them, so the article in `A common cause is` is no
   answer; nor is a letter in a list (`B, C`, `(A) and (B)`), nor the first of several lines that
   begin with a letter (the options repeated).
   Or a phrase names the letter: `the answer is B`, `answer: (C)`, `correct option is D`,
   `I choose A`. If the beginning and the phrases name different letters, there is no answer.
   Of ten other languages only "the answer is B" at the end of a clause is known, and negations.
3. A statement about exactly one letter: `it is D`, `so, C`, `D is correct`. A letter that merely
   occurs (`hepatitis B`, `vitamin D is low`) does not count.
4. The text of exactly one option occurs in the answer.
Full-width letters and punctuation are read as ASCII.
A negated letter or text (`not B`, `B is wrong`, `neither A nor B`, `not aspirin`) is never chosen.
"""

import re
from collections.abc import Sequence

from job.spec.fields import LETTERS

_MARKUP = re.compile(r"[*_`#>$]+|\\boxed\{|\}")
_OPEN, _CLOSE = r"[\(\[\"'‘“]", r"[\)\]\"'’”]"
_LEADING = re.compile(
    rf"{_OPEN}?([A-Za-z])(?:{_CLOSE}+[.:,;]*|[.:,;](?=\s|$)|\s*$|\s*\n|\s+[-–—]\s)"
)
_LIST_FOLLOWS = re.compile(
    rf"^\s*(?:,|/|&|and\b|or\b|nor\b)+\s*(?:and\s+|or\s+)?{_OPEN}?[A-Z](?![\w'’])"
)

_PHRASE = re.compile(
    r"(?i:\b(?:answer|choice|option|choose|select|pick|chose|go with)\b"
    r"(?:\s+(?:is|would\s+be|will\s+be|should\s+be|choice|option|letter|answer|the|correct|right))*)"
    rf"\s*[:=-]?\s*{_OPEN}?([A-Za-z])(?![\w'’])"
)

_PHRASE_ABROAD = re.compile(
    r"(?:答案|正解|答え|解答|정답|답|(?:(?<=我)|(?<=故)|(?<=所以)|(?<=因此)|(?<![^\s.,;:!?]))选择?"
    r"|(?i:\b(?:respuesta|réponse|resposta|antwort|risposta|ответ|jawaban|đáp án)\b))"
    r"(?:[\s:=)-]|是|为|為|应|该|选|项|は|が|은|는|(?i:\b(?:correcta|correcte|correta|corretta|es|est|é|è|"
    r"ist|lautet|là|adalah|la|opción|opção|option|вариант|это)\b))*"
    rf"{_OPEN}?([A-Z])(?={_CLOSE}*\s*(?:[.,;!\n]|$|です|である|だ[.\s]|입니다|이다))"
)
_ENDS = dict(zip("。．，、：；！？）」』】", "..,,:;!?))))", strict=True))
"""Full-width signs after which text without spaces needs one."""

_FULL_WIDTH = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    | dict.fromkeys("「『【", "(")
    | {sign: f"{plain} " for sign, plain in _ENDS.items()}
)

_CONNECTIVES = r"(?:because|since|as|is|was|for|due|which|and|or|nor|but|given|based|seems|would)\b"
_NOUN_FOLLOWS = re.compile(rf"^\s+(?!{_CONNECTIVES})[a-z]")
"""After an `A` that is an article."""


# A statement about a letter is either "(it is) B (.)" or "(.) B (is correct)".
_STATED_BEFORE = re.compile(
    r"(?:\b(?:is|be|so|therefore|thus|hence|but|then)\b[,:]?|[=:])\s*$", re.IGNORECASE
)
_CLAUSE_ENDS = re.compile(rf"^{_CLOSE}*\s*(?:[.,;:!?]|$|\b(?:because|since|as|not|rather)\b)")
_CLAUSE_BEGINS = re.compile(
    r"(?:^|[.!?:;,\n]|\b(?:so|that|option|choice|letter))\s*$", re.IGNORECASE
)

_STATED_AFTER = re.compile(
    rf"^{_CLOSE}*\s+"
    r"(?:is\s+(?:the\s+)?(?:correct|right|best|true|answer|most likely)|rather than)\b",
    re.IGNORECASE,
)

_NEGATED_BEFORE = re.compile(
    r"(?:\bnot|n['’]t|\bcannot|\bnever|\bneither|\bnor|\bwithout|\brather than|\binstead of|"
    r"\bexcept|\bexclud\w*|\brul\w* out|\beliminat\w*|"
    r"\bno es|\bnicht|\bkeine?|\bpas|\bnão é|\bnon è|\bне)\s+"
    r"(?:be\s+|choose\s+|option\s+|answer\s+|choice\s+|the\s+|(?:la|el|le|il|a|o|die|der|das)\s+)*"
    rf"{_OPEN}?$",
    re.IGNORECASE,
)

_NEGATED_AFTER = re.compile(
    rf"^(?:{_CLOSE}|[.:])*\s*(?:(?:is|are|was|would be|can be|must be)\s+(?:an?\s+|the\s+)?)?"
    r"(?:not\b|isn['’]t|aren['’]t|wasn['’]t|cannot|can['’]t|never\b|wrong|incorrect|false|"
    r"excluded|eliminated|ruled out|nor\b|不|错|錯|誤|間違|no es\b|falsch|nicht\b|n['’]est pas\b|"
    r"não é\b|non è\b|не\b|неверн)",
    re.IGNORECASE,
)


def parse_choice(answer: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that `answer` chooses, or None if that is not clear.

    Args:
        answer: generated text.
        options: texts of the options; the first is A.
    """
    letters = LETTERS[: len(options)]
    options = [option.translate(_FULL_WIDTH).strip() for option in options]
    text = _MARKUP.sub("", answer).translate(_FULL_WIDTH).strip()
    exact = [_normalize(option) == _normalize(text) for option in options]
    if sum(exact) == 1:
        return letters[exact.index(True)]
    masked = _mask_options(text, options)
    without_list = _mask_list(masked, letters)
    is_list = without_list != masked
    # "A:" may stand for "answer": then what follows names the letter.
    is_marked, masked = without_list.startswith("A:"), without_list.removeprefix("A:").strip()
    declared = _leading_letter(masked, letters) | _phrase_letters(masked, letters)
    for chosen in (declared, _stated_letters(masked, letters)):
        if chosen:
            return chosen.pop() if len(chosen) == 1 else None
    if is_list:
        return None
    return _option_text(text, letters, options) or ("A" if is_marked and masked else None)


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _mask_options(text: str, options: Sequence[str]) -> str:
    """Mask the options that contain a letter of their own, such as `Vitamin C`."""
    for option in sorted(options, key=len, reverse=True):
        if len(option) > 1 and re.search(r"(?<!\w)[A-Z](?!\w)", option):
            text = re.sub(rf"(?<!\w){re.escape(option)}(?!\w)", "…", text, flags=re.IGNORECASE)
    return text


def _mask_list(text: str, letters: str) -> str:
    """Mask the letters of options that the answer repeats in order, from A, in one style."""
    marks: list[re.Match[str]] = []
    before, style, position = r"(?:^|[\n:])\s*", r"[.:)\]]", 0
    for letter in letters:
        pattern = re.compile(rf"{before}({_OPEN}?{letter}({style}))(?=\s|$)")
        match = pattern.search(text, position)
        if not match or _negated(text, *match.span(1)):
            break
        marks.append(match)
        before, style, position = r"\s", re.escape(match[2]), match.end()
    for mark in reversed(marks if len(marks) > 1 else []):
        text = f"{text[: mark.start(1)]}…{text[mark.end(1) :]}"
    return text


def _leading_letter(text: str, letters: str) -> set[str]:
    """Return the lone letter at the beginning (rule 2)."""
    match = _LEADING.match(text)
    lines = [_LEADING.match(line.strip()) for line in text.splitlines()]
    if len({line[1].upper() for line in lines if line and line[1].upper() in letters}) > 1:
        return set()
    if not match or match[1].upper() not in letters:
        return set()
    if _LIST_FOLLOWS.match(text[match.end(1) :].lstrip(")]\"'")) or _negated(text, *match.span(1)):
        return set()
    return {match[1].upper()}


def _phrase_letters(text: str, letters: str) -> set[str]:
    """Return the letters that a phrase names as the answer (rule 2)."""
    named = set()
    for match in (*_PHRASE.finditer(text), *_PHRASE_ABROAD.finditer(text)):
        letter, rest = match[1], text[match.end(1) :]
        if letter.upper() not in letters or _negated(text, *match.span(1)):
            continue
        if letter.islower() and not re.match(rf"{_CLOSE}|[.,;:]|\s*$", rest):
            continue
        if letter == "A" and _NOUN_FOLLOWS.match(rest):
            continue
        named.add(letter.upper())
        if second := _LIST_FOLLOWS.match(re.sub(rf"^{_CLOSE}+", "", rest)):
            named.add(second[0][-1])
    return named


def _stated_letters(text: str, letters: str) -> set[str]:
    """Return the letters that a statement says are right (rule 3)."""
    return {
        match[1]
        for match in re.finditer(rf"(?<![\w'’-]){_OPEN}?([{letters}])(?![\w'’-])", text)
        if _is_stated(text[: match.start()], text[match.end(1) :])
        and not _negated(text, *match.span(1))
        and not _LIST_FOLLOWS.match(text[match.end(1) :])
    }


def _is_stated(before: str, after: str) -> bool:
    return bool(
        (_STATED_BEFORE.search(before) and _CLAUSE_ENDS.match(after))
        or (_CLAUSE_BEGINS.search(before) and _STATED_AFTER.match(after))
    )


def _negated(text: str, start: int, end: int) -> bool:
    return bool(_NEGATED_BEFORE.search(text[:start]) or _NEGATED_AFTER.match(text[end:]))


def _option_text(text: str, letters: str, options: Sequence[str]) -> str | None:
    """Return the letter of the only option whose text occurs (rule 4)."""
    normalized = _normalize(text)
    matches = []
    for letter, option in zip(letters, options, strict=True):
        words = _normalize(option)
        spans = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", normalized)]
        if words and any(not _negated(normalized, *span) for span in spans):
            matches.append((letter, words))
    # An option inside the text of a longer option that also occurs was not itself named.
    named = [
        (letter, words)
        for letter, words in matches
        if not any(words != longer and words in longer for _, longer in matches)
    ]
    return named[0][0] if len(named) == 1 else None
