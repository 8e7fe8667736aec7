"""Text from data and models, made safe to show."""

import unicodedata


def legible(text: str) -> str:
    """Return the text with every invisible or direction-changing character shown by its code.

    Line breaks, tabs and the joiners that scripts and emoji need stay.
    """

    def shown(char: str) -> str:
        if char.isprintable() or char in "\n\t\u200c\u200d" or unicodedata.category(char) == "Zs":
            return char
        # Not Unicode's control pictures: few fonts have them.
        return f"\u2039U+{ord(char):04X}\u203a"

    return text if text.isprintable() else "".join(map(shown, text.replace("\r\n", "\n")))
