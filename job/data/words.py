"""Words of text in any script, for ROUGE and for the search for evaluation questions.

A word is a sequence of letters, with their marks, and digits. Scripts without spaces between words,
such as Chinese, Japanese, and Thai, give a word per character.
"""

import re
import unicodedata

import regex

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー"
_LETTER = rf"[\p{{L}}--[\p{{sc=Common}}{_UNSPACED}]]"  # common to all scripts are signs like µ
_CHARACTER = regex.compile(rf"[{_UNSPACED}]\p{{M}}*", regex.V1)
_WORD = regex.compile(rf"{_CHARACTER.pattern}|(?:{_LETTER}\p{{M}}*|\p{{Nd}})+", regex.V1)
_ASCII_WORD = re.compile("[A-Za-z0-9]+")


def split_words(text: str) -> list[str]:
    """Return the words of a text in order, in their own case."""
    if text.isascii():
        return _ASCII_WORD.findall(text)
    words: list[str] = _WORD.findall(unicodedata.normalize("NFC", text))
    return words


def is_character(word: str) -> bool:
    """Return whether a word is a character of a script without spaces."""
    return not word.isascii() and _CHARACTER.fullmatch(word) is not None
