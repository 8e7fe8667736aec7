"""Tests of the report, and the examples they share: a full run, a minimal one, a hostile one."""

from typing import Any

from job.evals.predictions import ChoiceLine
from job.report.render import Flip

EVIL = (
    "a: <script>alert(1)</script> \"'><img src=http://evil.example/x onerror=alert(2)>\x1b[31m\x00"
    "\u202e `tick` ``` ~~~~ | pipe | \\ [link](http://evil.example) ![i](x) <http://evil.example> "
    "**b** _i_ $m$ &lt; &#60; {{ 1 }} {% raw %} \ud800 ]]> --> </style></title></pre></svg>\r\n"
    "\n```\n# heading\n- item\n1. one\n> quote\n---\n<b>\n    code\n| a |\n|---|\n" + "W" * 5000
)


def estimate(mean: float) -> dict[str, Any]:
    return {"mean": mean, "ci95": [mean - 0.006, mean + 0.006]}


def score(correct: int, accuracy: float, low: float, high: float, **other: Any) -> dict[str, Any]:
    letters = {"A": 25, "B": 25, "C": 25, "D": 25}
    shown = {"correct": correct, "accuracy": accuracy, "ci95": [low, high], "letters": letters}
    return {"unparsed": 0, "missing": 0} | shown | other


def paired(a: str, b: str, gained: int, lost: int, p_value: float, finding: str) -> dict[str, Any]:
    counts = {"a": a, "b": b, "questions": 4183, "gained": gained, "lost": lost}
    return counts | {
        "p_value": p_value,
        "p_holm": min(1.0, 2 * p_value),
        "detectable": 0.0197,
        "difference": (gained - lost) / 4183,
        "ci95": [-0.0068, 0.0546],
        "finding": finding,
    }


def share(count: int, of: int) -> dict[str, Any]:
    return {"count": count, "of": of, "share": count / of, "ci95": [0.1, 0.9]}


def rouge(mean: float) -> dict[str, Any]:
    parts = {"rouge1": estimate(mean * 2), "rouge2": estimate(mean / 5), "rougeL": estimate(mean)}
    return parts | {"mean_tokens": 88.4, "truncated": 21}


def full() -> dict[str, Any]:
    """A run with every part, as it stands in results.json."""
    empty = minimal()
    return empty | {
        "verdict": {
            "answer": "better",
            "sentence": "Fine-tuning helped: medmcqa accuracy went from 31.0% to 35.1%.",
            "next_step": "Read the answers side by side.",
            "benchmark": "improved",
            "style": "no measurable change",
        },
        "data": empty["data"] | {"rows": {"raw": 207408, "valid": 207405, "dropped": {"blank": 3}}},
        "training": empty["training"]
        | {
            "mfu": 0.083,
            "truncated": 412,
            "loss": {"train": 1.5127, "validation_before": 2.9134, "validation_after": 1.4981},
            "token_accuracy": {"train": 0.3961, "validation": 0.4129},
        },
        "evaluation": {
            "multiple_choice": [
                {
                    "name": "medmcqa",
                    "scoring": "letters",
                    "dataset": "hf://openlifescienceai/medmcqa",
                    "revision": "91c6572c",
                    "questions": 4183,
                    "chance": 0.25,
                    "majority_letter": "A",
                    "majority_accuracy": 0.3223,
                    "detectable_at_worst": 0.0308,
                    "models": {
                        "reference": score(2840, 0.6801, 0.6659, 0.6941, missing=7, unparsed=13),
                        "finetuned": score(1468, 0.3509, 0.3366, 0.3655),
                        "baseline": score(1297, 0.3101, 0.2963, 0.3243, letters={"A": 90, "B": 10}),
                    },
                    "comparisons": [
                        paired("baseline", "finetuned", 512, 341, 4.61e-9, "improved"),
                        paired(
                            "finetuned", "reference", 1500, 1470, 0.6912, "no measurable change"
                        ),
                    ],
                    "in_training_text": 17,
                    "grouped_by": "subject_name",
                    "groups": [
                        {
                            "name": name,
                            "questions": 2091,
                            "models": {
                                "baseline": share(650, 2091),
                                "finetuned": share(737, 2091),
                                "reference": share(1421, 2088),
                            },
                        }
                        for name in ("Anatomy", "Surgery")
                    ],
                }
            ],
            "dialogue": {
                "examples": 200,
                "max_new_tokens": 128,
                "models": {"baseline": rouge(0.109), "finetuned": rouge(0.153)},
                "nulls": {
                    "echoed_prompt": estimate(0.111),
                    "other_answer": estimate(0.102),
                    "polite_sentence": estimate(0.081),
                },
                "comparison": {
                    "a": "baseline",
                    "b": "finetuned",
                    "examples": 200,
                    "difference": 0.044,
                    "ci95": [0.036, 0.052],
                    "p_value": 0.001,
                    "p_holm": 0.002,
                    "finding": "improved",
                },
                "markers": [
                    {
                        "name": "urges urgent care",
                        "expected": share(41, 200),
                        "models": {"baseline": share(77, 200), "finetuned": share(46, 200)},
                        "comparison": paired("baseline", "finetuned", 12, 43, 3.3e-5, "worse"),
                    }
                ],
            },
            "side_by_side": [
                {
                    "id": "row-7",
                    "prompt": "My knee hurts.",
                    "expected": "Rest it.",
                    "answers": {"finetuned": "Please rest.", "baseline": "**Hello**"},
                }
            ],
        },
        "reference": empty["reference"]
        | {
            "model": "gemma-4-26b",
            "provider": ["DeepInfra"],
            "status": "partial",
            "reason": "3 failed",
            "cost_usd": 0.0123,
        },
        "artifacts": [{"path": "adapter/adapter.lora.h5", "bytes": 10482331, "sha256": "ab" * 32}],
        "cost": {"chip_hours": 2.46, "usd": 0.0123},
    }


def minimal() -> dict[str, Any]:
    """A run that measured nothing but its training."""
    return {
        "verdict": {"sentence": "Nothing was measured.", "benchmark": None, "style": None},
        "run": {
            "id": "doctor-3f9a1c77",
            "name": "doctor",
            "status": "complete",
            "started": "2026-11-23T08:01:12Z",
            "finished": "2026-11-23T08:19:40Z",
            "seconds": 1108.0,
            "stage_seconds": {"data": 88.1, "train": 402.7},
            "spec_digest": "sha256:3f9a1c77",
            "spec": {"name": "doctor", "seed": 42, "train": {"epochs": 1, "optimizer": "adamw"}},
            "resumes": 1,
        },
        "environment": {
            "platform": "tpu",
            "device_kind": "TPU v5 lite",
            "devices": 8,
            "processes": 1,
            "python": "3.12.11",
            "packages": {"keras": "3.15.1"},
            "git_commit": None,
            "image": None,
        },
        "model": {
            "preset": "hf://google/gemma-3-1b-it",
            "revision": None,
            "chat_template": "gemma",
            "dtype": "bfloat16",
            "lora_rank": 16,
            "lora_alpha": 16.0,
            "lora_targets": ["query", "value"],
            "parameters": {"total": 999885952, "trainable": 2609152},
        },
        "data": {
            "dataset": "samples",
            "revision": None,
            "rows": {"raw": 20, "valid": 20, "dropped": {}},
            "train": 1800,
            "validation": 200,
            "neutralised": 0,
        },
        "training": {
            "steps": 1250,
            "kept_step": 1250,
            "stopped_early": False,
            "examples": 1800,
            "truncated": 0,
            "dropped": 0,
            "tokens": {"trained": 4711230, "padded": 5120000, "loss": 2512007},
            "seconds": {"total": 390.4, "compile": 43.8},
            "tokens_per_second": 13593.4,
            "mfu": None,
            "loss": {"train": 1.5127, "validation_before": None, "validation_after": None},
            "token_accuracy": {"train": 0.3961, "validation": None},
        },
        "evaluation": {"multiple_choice": [], "dialogue": None, "side_by_side": []},
        "reference": {
            "model": None,
            "provider": [],
            "requests": 0,
            "failed": 0,
            "tokens": {"prompt": 0, "completion": 0},
            "cost_usd": 0.0,
            "status": "skipped",
            "reason": "the spec names no reference model",
        },
        "artifacts": [],
        "cost": {"chip_hours": 0.0, "usd": None},
    }


def evil(value: Any, key: str = "") -> Any:
    """The same shape with every free text hostile."""
    if isinstance(value, dict):
        free = key in ("dropped", "packages", "stage_seconds")
        return {f"{EVIL}{name}" if free else name: evil(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [evil(item, key) for item in value]
    choices = ("status", "scoring", "answer", "finding", "benchmark", "style", "a", "b", "family")
    return EVIL if isinstance(value, str) and key not in choices else value


HISTORY: list[dict[str, Any]] = [
    {"step": 0, "validation_loss": 2.9134, "validation_token_accuracy": 0.3},
    *(
        {"step": step, "loss": 1.4 + 20 / (step + 10), "tokens_per_second": 13_000.0 + step}
        for step in range(10, 1251, 10)
    ),
    {"step": 1250, "validation_loss": 1.4981, "validation_token_accuracy": 0.4},
]


def flip(eval: str, identity: str, question: str, gold: str, answer: str, gained: bool) -> Flip:
    before, after = (
        ChoiceLine(
            id=identity, question=question, options=[answer], gold=gold, choice=choice,
            correct=correct,
        )
        for choice, correct in ((None, not gained), (answer, gained))
    )  # fmt: skip
    return Flip(eval, before, after)


FLIPS = [
    flip("medmcqa", f"q{number}", f"Question {number}?", "B", "B", gained=number % 5 != 0)
    for number in range(100)
]
EVIL_FLIPS = [flip(EVIL, EVIL, EVIL, EVIL, EVIL, each.after.correct) for each in FLIPS]
