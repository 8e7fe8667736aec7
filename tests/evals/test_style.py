"""A style trait is a phrase that occurs in an answer as words."""

import pytest

from job.evals.metrics import phrase_pattern, summarize_style
from job.evals.predictions import DialogueLine
from job.evals.statistics import Bootstrap
from job.spec.evals import MARKERS


@pytest.mark.parametrize(
    ("phrases", "text", "shows"),
    [
        (["see a doctor"], "Please See  a\nDoctor today", True),
        (["may"], "Maybe in May-be", True),
        (["may"], "maybe dismay", False),
        (["?"], "Does it hurt?", True),
        (["?"], "It hurts.", False),
        (["#"], "take it twice", False),
        (["#"], "take 1,000 mg", True),
        (["# mg"], "take 2.5 mg", True),
        (["# mg"], "take some mg", False),
        (["don't"], "Don’t worry", True),
        (["(sic)"], "this (sic) is", True),
    ],
)
def test_phrases(phrases: list[str], text: str, shows: bool) -> None:
    assert (phrase_pattern(phrases).search(text.replace("’", "'")) is not None) is shows


def line(number: int, answer: str, expected: str) -> DialogueLine:
    return DialogueLine(
        id=str(number), prompt="p", expected=expected, answer=answer, tokens=1, finish="stop",
        rouge1=0, rouge2=0, rougeL=0,
    )  # fmt: skip


def test_each_trait_is_a_share_of_each_model_and_the_expected() -> None:
    before = [line(n, "It may pass.", "Consult a doctor.") for n in range(20)]
    after = [line(n, "Go to the emergency room now.", "Consult a doctor.") for n in range(20)]
    models = {"baseline": before, "finetuned": after}
    traits = {trait.name: trait for trait in summarize_style(MARKERS, models, Bootstrap(500, 0))}
    urgent = traits["urges urgent care"]
    assert (urgent.models["baseline"].share, urgent.models["finetuned"].share) == (0.0, 1.0)
    assert urgent.expected.share == 0.0
    assert urgent.comparison is not None
    assert (urgent.comparison.gained, urgent.comparison.finding) == (20, "improved")
    assert traits["hedges"].models["baseline"].count == 20
    assert traits["refers to a professional"].expected.share == 1.0
    assert traits["asks back"].comparison is not None
    assert traits["asks back"].comparison.finding == "no measurable change"
