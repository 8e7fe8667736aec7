"""What a model is asked, zero-shot and few-shot, as a chat turn and as the harness does."""

import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import UsageError
from job.evals.tasks import Task, load_task, question_messages, question_prompts
from job.model.language_model import LanguageModel
from job.spec.schema import MultipleChoiceEval

ROWS = [
    {"question": f"Which {n}?", "a": "red ", "b": f"blue {n}", "cop": n % 2, "about": subject}
    for n, subject in enumerate(["Eyes", "Eyes", None, "Skin", "Skin", "Skin"])
]


def load(folder: Path, **entry: Any) -> Task:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    fields: dict[str, Any] = {"options": ["a", "b"], "answer": "cop", **entry}
    return load_task(MultipleChoiceEval(name="first", dataset=str(path), **fields))


def test_solved_questions_are_earlier_turns_and_none_of_those_asked(tmp_path: Path) -> None:
    found = load(tmp_path, limit=2, few_shot={"examples": 2})
    assert [shot.text for shot in found.shots] == ["Which 2?", "Which 3?"]
    first = question_messages(found)[0]
    assert question_prompts(found)[0] == first
    assert [m.content for m in first if m.role == "assistant"] == ["A", "B"]
    assert [m.role for m in first] == ["user", "assistant", "user", "assistant", "user"]
    assert first[0].content.startswith("Which 2?")
    assert first[-1].content.startswith("Which 0?")


def test_too_few_solved_questions_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only 1 usable questions of split 'train' are not asked"):
        load(tmp_path, limit=5, few_shot={"examples": 2})


def test_the_harness_prompt_is_text_as_it_is_without_a_chat_turn(tmp_path: Path) -> None:
    found = load(tmp_path, limit=1, prompt="lm-eval", few_shot={"examples": 1})
    assert question_prompts(found) == [
        "Question: Which 1?\nChoices:\nA. red \nB. blue 1\nAnswer: B\n\n"
        "Question: Which 0?\nChoices:\nA. red \nB. blue 0\nAnswer:"
    ]


def test_the_harness_prompt_is_for_letters_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`prompt: lm-eval` needs `scoring: letters`"):
        load(tmp_path, prompt="lm-eval", scoring="generate")


def test_questions_carry_what_they_are_grouped_by(tmp_path: Path) -> None:
    assert [q.group for q in load(tmp_path, group="about").questions] == [
        "Eyes", "Eyes", "none", "Skin", "Skin", "Skin",
    ]  # fmt: skip


def test_letters_after_a_space_are_told_apart_by_their_last_token(tiny: LanguageModel) -> None:
    found = tiny.codec.letter_tokens("ABCD", "Answer:", " ")
    context = tiny.codec.encode(["Answer:"])[0]
    for letter, last in zip("ABCD", found.ids, strict=True):
        assert tiny.codec.encode([f"Answer: {letter}"])[0] == [*context, *found.shared, last]
