"""A trait of style is a phrase that stands in an answer as whole words."""

import pytest

from job.evals.metrics import pattern_of, summarize_style
from job.evals.predictions import DialogueLine
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
    assert (pattern_of(phrases).search(text.replace("’", "'")) is not None) is shows


def line(number: int, answer: str, expected: str) -> DialogueLine:
    return DialogueLine(
        id=str(number), prompt="p", expected=expected, answer=answer, tokens=1, finish="stop",
        rouge1=0, rouge2=0, rougeL=0,
    )  # fmt: skip


def test_each_trait_is_a_share_of_each_model_beside_the_expected_answers() -> None:
    before = [line(n, "It may pass.", "Consult a doctor.") for n in range(20)]
    after = [line(n, "Go to the emergency room now.", "Consult a doctor.") for n in range(20)]
    found = {
        m.name: m
        for m in summarize_style(MARKERS, {"baseline": before, "finetuned": after}, 500, 0)
    }
    urgent = found["urges urgent care"]
    assert (urgent.models["baseline"].share, urgent.models["finetuned"].share) == (0.0, 1.0)
    assert urgent.expected.share == 0.0
    assert urgent.comparison is not None
    assert (urgent.comparison.gained, urgent.comparison.finding) == (20, "improved")
    assert found["hedges"].models["baseline"].count == 20
    assert found["refers to a professional"].expected.share == 1.0
    assert found["asks back"].comparison is not None
    assert found["asks back"].comparison.finding == "no measurable change"
