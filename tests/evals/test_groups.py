"""Accuracy by group covers every question once, without missing answers."""

from job.evals.metrics import group_scores
from job.evals.predictions import ChoiceLine, choice_line
from job.evals.tasks import Question


def lines(choices: str, subjects: list[str | None]) -> list[ChoiceLine]:
    made = []
    for number, (choice, subject) in enumerate(zip(choices, subjects, strict=True)):
        question = Question(f"q{number}", "Which?", ("w", "x"), "A", subject)
        error = "HTTP 502" if choice == "!" else None
        made.append(choice_line(question, None if choice in "-!" else choice, error=error))
    return made


def test_groups_are_sorted_by_size_without_missing_answers() -> None:
    subjects: list[str | None] = ["Eyes", "Skin", "Skin", "Skin"]
    groups = group_scores(
        {"baseline": lines("ABA-", subjects), "reference": lines("!AA!", subjects)}
    )
    assert [(g.name, g.questions) for g in groups] == [("Skin", 3), ("Eyes", 1)]
    skin, eyes = groups
    assert (skin.models["baseline"].count, skin.models["baseline"].of) == (1, 3)
    assert (skin.models["reference"].count, skin.models["reference"].of) == (2, 2)
    assert (eyes.models["reference"].of, eyes.models["reference"].ci95) == (0, (0.0, 1.0))


def test_questions_without_a_group_are_not_grouped() -> None:
    assert group_scores({"baseline": lines("AB", [None, None])}) == []
