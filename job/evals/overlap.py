"""ROUGE and chrF: how much of an expected text an answer has, in any script."""

from functools import cache
from types import SimpleNamespace
from typing import Any

from job.chat.thoughts import split_thoughts
from job.data.words import split_words

ROUGE_METRICS = ("rouge1", "rouge2", "rougeL")


@cache
def _scorers() -> tuple[Any, Any]:
    """Return the scorers of ROUGE and of chrF.

    That of ROUGE takes words in any script; those of English are stemmed, as ROUGE does.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer
    from sacrebleu.metrics.chrf import CHRF

    english = DefaultTokenizer(use_stemmer=True)

    def tokenize(text: str) -> list[str]:
        return [
            part
            for word in split_words(text.lower())
            for part in (english.tokenize(word) if word.isascii() else [word])
        ]

    return RougeScorer(ROUGE_METRICS, tokenizer=SimpleNamespace(tokenize=tokenize)), CHRF()


def overlap_scores(expected: str, answer: str) -> dict[str, float]:
    """Return F-measures from 0 to 1 by metric.

    They are ROUGE of words (Lin 2004), and `chrf` of characters (Popović 2015).
    """
    expected = split_thoughts(expected)[1] or expected
    rouge_scorer, chrf_scorer = _scorers()
    rouge = rouge_scorer.score(expected, answer)
    scores = {name: float(rouge[name].fmeasure) for name in ROUGE_METRICS}
    scores["chrf"] = chrf_scorer.sentence_score(answer, [expected]).score / 100
    return {name: round(score, 6) for name, score in scores.items()}
