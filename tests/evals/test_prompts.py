"""Prompts are chat turns or lm-evaluation-harness's text, zero-shot or few-shot."""

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


def test_few_shot_examples_are_earlier_turns_and_not_scored(tmp_path: Path) -> None:
    task = load(tmp_path, limit=2, few_shot={"examples": 2})
    assert [example.text for example in task.few_shot] == ["Which 2?", "Which 3?"]
    first = question_messages(task)[0]
    assert question_prompts(task)[0] == first
    assert [m.content for m in first if m.role == "assistant"] == ["A", "B"]
    assert [m.role for m in first] == ["user", "assistant", "user", "assistant", "user"]
    assert first[0].content.startswith("Which 2?")
    assert first[-1].content.startswith("Which 0?")


def test_too_few_few_shot_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="split 'train' has only 1 usable questions that are not"):
        load(tmp_path, limit=5, few_shot={"examples": 2})


def test_the_lm_eval_prompt_is_plain_text(tmp_path: Path) -> None:
    task = load(tmp_path, limit=1, prompt="lm-eval", few_shot={"examples": 1})
    assert question_prompts(task) == [
        "Question: Which 1?\nChoices:\nA. red \nB. blue 1\nAnswer: B\n\n"
        "Question: Which 0?\nChoices:\nA. red \nB. blue 0\nAnswer:"
    ]


def test_the_lm_eval_prompt_is_for_letters_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`prompt: lm-eval` needs `scoring: letters`"):
        load(tmp_path, prompt="lm-eval", scoring="generate")


def test_questions_have_their_group(tmp_path: Path) -> None:
    assert [q.group for q in load(tmp_path, group="about").questions] == [
        "Eyes", "Eyes", "none", "Skin", "Skin", "Skin",
    ]  # fmt: skip


def test_letters_after_a_space_differ_in_their_last_token(tiny: LanguageModel) -> None:
    options = tiny.tokenizer.letter_tokens("ABCD", "Answer:", " ")
    context = tiny.tokenizer.encode(["Answer:"])[0]
    for letter, last in zip("ABCD", options.ids, strict=True):
        assert tiny.tokenizer.encode([f"Answer: {letter}"])[0] == [*context, *options.shared, last]
