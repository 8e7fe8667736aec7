"""Traits of style in answers: which of them show one, by the phrases that the spec lists for it.

A count of phrases is no judgement of an answer. It makes a number of what is easily claimed,
that the answers became more direct or more careful, beside the share of the expected answers.
"""

import re
from collections.abc import Mapping, Sequence

from job.evals.paired import compare_shares
from job.evals.predictions import DialogueLine, answered
from job.evals.stats import share
from job.results import Marker, Share

_NUMBER = r"\\d+(?:[.,]\\d+)*"


def pattern_of(phrases: Sequence[str]) -> re.Pattern[str]:
    """What matches where any of the phrases stands: whole words, any case, `#` for a number."""
    return re.compile("|".join(_pattern(phrase) for phrase in phrases), re.IGNORECASE)


def _pattern(phrase: str) -> str:
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    before = r"(?<!\w)" if re.match(r"\w", phrase) else ""
    after = r"(?!\w)" if re.search(r"\w$", phrase) else ""
    return before + re.sub(r"\\#", _NUMBER, words) + after


def summarise(
    markers: Mapping[str, Sequence[str]],
    models: Mapping[str, Sequence[DialogueLine]],
    samples: int,
    seed: int,
) -> list[Marker]:
    """How often each trait shows in the expected answers and in each model's, compared in pairs."""
    return [
        _marker(name, pattern_of(phrases), models, samples, seed)
        for name, phrases in markers.items()
    ]


def _marker(
    name: str,
    pattern: re.Pattern[str],
    models: Mapping[str, Sequence[DialogueLine]],
    samples: int,
    seed: int,
) -> Marker:
    def shows(text: str) -> bool:
        return pattern.search(text.replace("’", "'")) is not None

    found = {
        model: {line.id: shows(line.answer) for line in answered(lines).values()}
        for model, lines in models.items()
    }
    expected = {line.id: shows(line.expected) for line in models["baseline"]}
    return Marker(
        name=name,
        expected=_share(expected),
        models={model: _share(shown) for model, shown in found.items()},
        comparison=compare_shares(
            "baseline", "finetuned", found["baseline"], found["finetuned"], samples, seed
        ),
    )


def _share(shown: Mapping[str, bool]) -> Share:
    return share(sum(shown.values()), len(shown))
