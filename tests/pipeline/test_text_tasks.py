"""Tasks with free answers, from the spec to the page: on files, on held-out examples, judged."""

import json
from pathlib import Path

import pytest
import yaml

from job.evals.predictions import TextLine, parse_predictions
from job.results import Results
from tests.command import Done, job
from tests.services.openrouter import Chat, OpenRouter

pytestmark = pytest.mark.slow
KEY = "sk-or-a-key-that-must-not-be-seen"
OWN = """
import os

def score(prompt, expected, answer):
    assert "OPENROUTER_API_KEY" not in os.environ
    return min(1.0, len(answer) / 100)
"""


def answer(chat: Chat) -> str:
    text = chat["messages"][-1]["content"]
    if "Answer 1:" in text:
        return "1"
    return "odd" if "odd or even" in text else "Drink water."


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, two_blocks: str
) -> tuple[Done, Path, OpenRouter]:
    """A run with every kind of task, a reference and a judge."""
    work = tmp_path_factory.mktemp("tasks")
    (work / "mine.py").write_text(OWN)
    rows = [{"问题": f"Is {n} odd or even?", "a": ["even", "odd"][n % 2]} for n in range(20)]
    rows.append({"问题": "Is x odd or even?", "a": None})
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parity = {"dataset": str(work / "rows.jsonl"), "prompt": "{问题}", "response": "{a}"}
    with OpenRouter(answer=answer, key=KEY) as service:
        endpoint = {"model": "m", "base_url": f"{service.url}/api/v1", "attempts": 1}
        spec = {
            "name": "t", "output": str(work / "runs"), "model": {"preset": two_blocks},
            "data": {
                "dataset": "samples", "prompt": "{input}", "response": "{output}",
                "train_examples": 8, "validation_examples": 6,
            },
            "train": {"batch_size": 4, "max_length": 256, "learning_rate": 1e-2},
            "evals": {
                "tasks": [
                    {"name": "parity", "metric": "label", "max_new_tokens": 8} | parity,
                    {"name": "held", "metric": "rouge", "max_new_tokens": 8},
                    {
                        "name": "own", "metric": f"{work / 'mine.py'}:score", "limit": 3,
                        "max_new_tokens": 8, "role": "retention",
                    },
                ],
                "dialogue": {"max_new_tokens": 8},
                "judge": endpoint | {"examples": 5},
                "side_by_side": {"examples": 0},
            },
            "reference": endpoint | {"evals": ["parity"]},
        }  # fmt: skip
        (work / "spec.yaml").write_text(yaml.safe_dump(spec))
        done = job("run", str(work / "spec.yaml"), environment={"OPENROUTER_API_KEY": KEY})
        assert done.code == 0, done.err
        (run,) = (path for path in (work / "runs").iterdir() if path.name != "datasets")
        return done, run, service


def test_every_score_is_that_of_its_predictions(finished: tuple[Done, Path, OpenRouter]) -> None:
    _, run, _ = finished
    results = Results.model_validate_json((run / "results.json").read_bytes())
    for task in results.evaluation.tasks:
        for model, mean in task.models.items():
            path = run / "evals" / model / task.name / "predictions.jsonl"
            lines = parse_predictions(path.read_bytes(), TextLine)
            assert len(lines) == task.samples
            assert mean == pytest.approx(sum(line.score for line in lines) / len(lines))
    parity, held, own = results.evaluation.tasks
    assert (parity.samples, parity.rows.dropped) == (20, {"null in 'a'": 1})
    assert parity.trivial["majority_answer"].mean == 0.5
    assert 0.2 < parity.trivial["shuffled_answer"].mean < 0.8
    assert parity.models["reference"] == 0.5
    assert (held.task, held.samples, own.samples) == ("held-out", 6, 3)
    assert own.comparison.family == "retention"
    judge = results.evaluation.judge
    assert judge is not None
    assert (judge.examples, judge.contradictions, judge.service.requests) == (5, 5, 10)
    assert results.cost.usd == pytest.approx(
        results.reference.cost_usd + judge.service.cost_usd, abs=1e-6
    )


def test_the_pages_and_the_card_show_the_tasks(finished: tuple[Done, Path, OpenRouter]) -> None:
    done, run, _ = finished
    for name in ("report.html", "report.md"):
        page = (run / name).read_text()
        assert "the label that the answer is, or the only one it names, of even, odd" in page
        assert "without knowing which is which" in page
        assert "stayed the same in only 0%" in page
    assert "- parity (" in (run / "adapter/README.md").read_text()
    assert KEY not in done.out + done.err
    for path in run.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


def test_a_task_that_cannot_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    task = "evals.tasks=[{name: own, metric: missing.py:score}]"
    done = job("run", "smoke", "--output", str(tmp_path / "runs"), "--set", task)
    assert done.code == 2
    assert "evals.tasks 'own': there is no file 'missing.py'" in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def score(prompt, answer): return 1", "define it as score(prompt, expected, answer)"),
        ("def other(prompt, expected, answer): return 1", "has no attribute 'score'"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_anything_is_written(
    content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(content)
    task = f"evals.tasks=[{{name: own, metric: {tmp_path / 'mine.py'}:score}}]"
    done = job("run", "smoke", "--output", str(tmp_path / "runs"), "--set", task)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "runs").exists()


def test_a_metric_that_changes_while_the_job_runs_is_no_result(
    two_blocks: str, tmp_path: Path
) -> None:
    changing = "from pathlib import Path\n\n\ndef score(prompt, expected, answer):\n"
    changing += "    Path(__file__).open('a').write('# another version\\n')\n    return 1.0\n"
    (tmp_path / "mine.py").write_text(changing)
    task = f"{{name: own, metric: {tmp_path / 'mine.py'}:score, limit: 1, max_new_tokens: 4}}"
    done = job(
        "run", "smoke", "--output", str(tmp_path / "runs"), "--until", "baseline",
        "--set", f"model.preset={two_blocks}", "--set", "evals.dialogue=null",
        "--set", "evals.multiple_choice=[]", "--set", "evals.side_by_side={examples: 0}",
        "--set", f"evals.tasks=[{task}]",
    )  # fmt: skip
    assert done.code == 2
    assert "changed while the job ran" in done.err
    assert not list(tmp_path.glob("runs/*/stages/baseline.json"))
