"""Tests of comparing runs, and the runs they compare."""

import hashlib
from collections.abc import Sequence
from typing import Any

from job.evals.predictions import ChoiceLine, DialogueLine, Line, choice_line
from job.evals.questions import Question
from job.results import Results
from job.storage.base import Store
from tests.report import full


def answers(choices: str, start: int = 0, text: str = "Which?") -> list[ChoiceLine]:
    """One line a choice; A is right, "!" is a question that got no answer."""
    found = []
    for number, choice in enumerate(choices, start):
        question = Question(f"q{number}", f"{text} {number}", ("w", "x", "y", "z"), "A")
        error = "HTTP 502" if choice == "!" else None
        found.append(choice_line(question, None if error else choice, error=error))
    return found


def talks(scores: Sequence[float], prompt: str = "It hurts.") -> list[DialogueLine]:
    """One line a score."""
    return [
        DialogueLine(
            id=f"d{number}", prompt=prompt, expected="Rest.", answer="Rest.", tokens=2,
            finish="stop", rouge1=score, rouge2=score, rougeL=score,
        )
        for number, score in enumerate(scores)
    ]  # fmt: skip


def leave_run(
    store: Store,
    identity: str,
    choices: Sequence[ChoiceLine] = (),
    dialogues: Sequence[DialogueLine] = (),
    change: Any = lambda results: None,
) -> None:
    """What `job compare` reads of a finished run; `change` may alter its results."""
    results = full()
    results["run"]["id"] = identity
    artifacts = []
    for name, lines in (("medmcqa", choices), ("dialogue", dialogues)):
        key = f"evals/finetuned/{name}/predictions.jsonl"
        content = _text(lines)
        store.write(key, content)
        digest = hashlib.sha256(content).hexdigest()
        artifacts.append({"path": key, "bytes": len(content), "sha256": digest})
    results["artifacts"] = artifacts
    change(results)
    store.write("results.json", Results.model_validate(results).model_dump_json().encode())


def _text(lines: Sequence[Line]) -> bytes:
    return "".join(f"{line.model_dump_json(exclude_defaults=True)}\n" for line in lines).encode()
