"""The metrics of tasks with free answers read what people write, and nothing that is not there."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from job.errors import UsageError
from job.evals.predictions import TextLine
from job.evals.statistics import Bootstrap
from job.evals.task_scores import summarize_text_task
from job.evals.text_metrics import Answer, Graded, json_fields, make_metric
from job.scores import RowCounts
from job.spec.evals import TextEval

LABELS = ["billing", "technical", "very urgent", "urgent"]


def entry_of(metric: str, **more: Any) -> TextEval:
    return TextEval.model_validate({"name": "t", "metric": metric, **more})


def graded(metric: str, expected: str, answer: str, **more: Any) -> Graded:
    made = make_metric(entry_of(metric, **more), LABELS)
    return made.grade([Answer("?", expected, answer)])[0]


@pytest.mark.parametrize(
    ("metric", "expected", "answer", "score"),
    [
        ("exact_match", "Paris", " paris.", 1),
        ("exact_match", "C", "C++", 0),
        ("exact_match", "ﬁn  de siècle", '"Fin de siècle"', 1),
        ("exact_match", "-5", "5", 0),
        ("exact_match", "北京", "北京。", 1),
        ("f1", "the cat sat", "a cat sat down", 4 / 7),
        ("f1", "猫坐下", "猫坐", 0.8),
        ("f1", "yes", "", 0),
        ("number", "#### 1,234", "It costs 12 a day, so 1234.0 in all.", 1),
        ("number", "3", "3 of 10", 0),
        ("number", "-0.5", "the answer is −0.5", 1),
        ("number", "1e-3", "0.001", 1),
        ("number", "7", "seven", 0),
        ("number", "3", "5-3", 1),
        ("number", "50 m²", "70 m²", 0),
        ("number", "12", "12 tons of CO2", 1),
        ("number", "0.5", ".5", 1),
        ("number", "19", "COVID-19", 1),
        ("number", "1e400", "2e400", 0),
        ("f1", "👍", "👎", 0),
        ("number", "-3", "(-3)", 1),
        ("label", "billing", "Billing.", 1),
        ("label", "billing", "This is a billing question", 1),
        ("label", "billing", "billing or technical", 0),
        ("label", "urgent", "very urgent", 0),
        ("label", "very urgent", "It is VERY urgent!", 1),
        ("label", "urgent", "insurgent", 0),
        ("json", '{"a": 1, "b": "X"}', '```json\n{"b": "x", "a": 1.0}\n```', 1),
        ("json", '{"a": 1, "b": 2}', 'Sure: {"a": 1, "c": 3} as asked', 1 / 3),
        ("json", '{"a": true}', '{"a": 1}', 0),
        ("json", '{"a": [1, {"b": null}]}', '{"a": [1, {"b": null}]}', 1),
        ("json", '{"a": 1}', "a is 1", 0),
        ("json", "{}", "{}", 1),
        ("json", "4", " 4", 1),
        ("json", '["x"]', 'See [1, for {example}: ["x"]', 1),
        ("rouge", "a b c", "a b c", 1),
        ("chrf", "北京", "北京", 1),
    ],
)  # fmt: skip
def test_answers_are_scored(metric: str, expected: str, answer: str, score: float) -> None:
    assert graded(metric, expected, answer).score == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    ("pattern", "expected", "answer", "score"),
    [
        (r"#### (-?\d+)", "20 #### 72", "so 10 #### 11, no: #### 72", 1),
        (r"#### (-?\d+)", "72", "#### 72", 1),
        (r"#### (-?\d+)", "72", "72", 0),
        (r"(?i)\bI can(no|')t\b", "anything", "I can't do that", 0),
        (r"(?i)\bI can(?:no|')t\b", "anything", "Sorry, I can't do that", 1),
    ],
)
def test_a_pattern_reads_its_last_match(
    pattern: str, expected: str, answer: str, score: float
) -> None:
    assert graded("regex", expected, answer, pattern=pattern).score == score


def test_a_pattern_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.evals.text_metrics.PATTERN_SECONDS", 0.2)
    with pytest.raises(UsageError, match="takes more than"):
        graded("regex", "x", "a" * 60 + "b", pattern=r"(a|aa)+$")


@pytest.mark.parametrize("labels", [["yes", "?"], ["*", "**"], ["C.", "C!"]])
def test_labels_that_cannot_be_told_apart_are_refused(labels: list[str]) -> None:
    with pytest.raises(UsageError, match="cannot be told from"):
        make_metric(entry_of("label"), labels)


@pytest.mark.parametrize("metric", ["exact_match", "f1"])
def test_nothing_is_never_the_same_as_nothing(metric: str) -> None:
    assert make_metric(entry_of(metric)).expected("...") is None
    assert graded(metric, "Yes", "").parsed is None


@pytest.mark.parametrize(("metric", "answer"), [("number", "none"), ("label", "?"), ("json", "{")])
def test_what_cannot_be_read_is_unparsed(metric: str, answer: str) -> None:
    assert graded(metric, {"number": "1", "label": "billing", "json": "1"}[metric], answer) == (
        0.0, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"metric": "bleu"}, "there is no metric 'bleu'"),
        ({"metric": "regex"}, "needs a `pattern`"),
        ({"metric": "f1", "pattern": "x"}, "needs a `pattern`, and only it"),
        ({"metric": "regex", "pattern": "("}, "not a regular expression"),
        ({"metric": "f1", "labels": ["a", "b"]}, "`labels` belongs to"),
        ({"metric": "f1", "dataset": "x.jsonl"}, "write `prompt` and `response`"),
        ({"metric": "f1", "prompt": "{a}", "response": "{b}"}, "have their prompts"),
    ],
)
def test_entries_that_mean_nothing_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TextEval.model_validate({"name": "t", "prompt": None, "response": None} | entry)


OWN = """
import os, sys

def score(prompt, expected, answer):
    print("noise")
    os.system("echo more; cat")
    if prompt == "quits":
        sys.exit(0)
    secrets = [name for name in os.environ if "KEY" in name or "TOKEN" in name]
    special = {"environment": len(secrets), "broken": None, "large": 7}
    return special.get(prompt, float(expected == answer))
"""


@pytest.fixture
def own(tmp_path: Path) -> TextEval:
    (tmp_path / "mine.py").write_text(OWN)
    return entry_of(f"{tmp_path / 'mine.py'}:score")


def test_a_function_of_the_users_scores_without_secrets(
    own: TextEval, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-secret")
    monkeypatch.setenv("HF_TOKEN", "hf-secret")
    answers = [
        Answer("?", "ä\u2028", "ä\u2028"),
        Answer("?", "a", "b"),
        Answer("environment", "", ""),
    ]
    assert [each.score for each in make_metric(own).grade(answers)] == [1.0, 0.0, 0.0]
    assert os.environ["HF_TOKEN"] == "hf-secret"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("broken", "TypeError"), ("large", "returned 7"), ("quits", "ended after 0 of 1")],
)
def test_a_function_that_fails_is_named(own: TextEval, prompt: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"mine.py:score.*{message}"):
        make_metric(own).grade([Answer(prompt, "a", "b")])


def test_values_of_json_keep_their_paths_and_types() -> None:
    fields = json_fields('{"a": [true, "X. "], "b": {}, "c": {"d": 1}}')
    assert fields == {"a[0]": (True, True), "a[1]": "x", "b": (False, {}), "c.d": (False, 1)}


def summarize(metric: str, triples: list[tuple[str, str, str]], **more: Any) -> Any:
    """Summarize a task of which (expected, baseline's answer, tuned answer) are given."""
    entry = entry_of(metric, **more)
    made = make_metric(entry, sorted({triple[0] for triple in triples}))

    def lines(which: int) -> list[TextLine]:
        scored = made.grade([Answer("?", each[0], each[which]) for each in triples])
        return [
            TextLine(
                id=str(number), prompt="?", expected=each[0], answer=each[which], score=score,
                target=made.expected(each[0]), parsed=parsed,
            )
            for number, (each, (score, parsed)) in enumerate(zip(triples, scored, strict=True))
        ]  # fmt: skip

    return summarize_text_task(
        entry, {"baseline": lines(1), "finetuned": lines(2)}, made, Bootstrap(500, 0),
        revision=None, truncated=0, trained_prompts=0,
        rows=RowCounts(raw=len(triples), valid=len(triples), dropped={}),
    )  # fmt: skip


def test_macro_f1_equals_its_definition() -> None:
    random = np.random.default_rng(0)
    labels = ["a", "b", "c"]
    rows = [(labels[n % 3], *random.choice(labels, 2)) for n in range(90)]
    score = summarize("label", rows).scores["baseline"]
    expected = []
    for label in labels:
        hits = sum(row[0] == row[1] == label for row in rows)
        named = sum(row[0] == label for row in rows) + sum(row[1] == label for row in rows)
        if named:
            expected.append(2 * hits / named)
    assert score.macro_f1.mean == pytest.approx(sum(expected) / len(expected))
    low, high = score.macro_f1.ci95
    assert low < score.macro_f1.mean < high < low + 0.4


def test_a_task_stands_beside_what_needs_no_model() -> None:
    rows = [("spam" if n % 10 else "ham", "spam", "spam" if n % 10 else "ham") for n in range(100)]
    result = summarize("label", rows)
    assert result.trivial["majority_answer"].mean == 0.9
    assert result.models == {"baseline": 0.9, "finetuned": 1.0}
    assert (result.comparison.gained, result.comparison.lost) == (10, 0)
    assert result.scores["baseline"].macro_f1.mean == pytest.approx(0.9 * 2 / 1.9 / 2)


def test_trivial_baselines_are_read_as_responses() -> None:
    rows = [("yes" if n % 10 else "no", "Answer: yes", "yes") for n in range(20)]
    result = summarize("regex", rows, pattern=r"Answer: (\w+)")
    assert result.models == {"baseline": 0.9, "finetuned": 0.0}
    assert result.trivial["majority_answer"].mean == 0.9


def test_fields_of_json_are_counted_apart() -> None:
    gold = json.dumps({"name": "Ann", "age": 4})
    rows = [(gold, '{"name": "ann"}', gold), (gold, "no", '{"age": 4}')]
    scores = summarize("json", rows).scores
    assert {path: share.count for path, share in scores["baseline"].fields.items()} == {
        "name": 1, "age": 0,
    }  # fmt: skip
    assert {path: share.count for path, share in scores["finetuned"].fields.items()} == {
        "name": 1, "age": 2,
    }  # fmt: skip
    assert scores["baseline"].unparsed == 1
