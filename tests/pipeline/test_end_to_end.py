"""The job as a user runs it: complete, skipped, killed, resumed, in a folder and in a bucket."""

import hashlib
import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pytest

from job.pipeline.layout import TRAINING
from job.results import Results
from job.train.metrics import EVENTS
from tests.command import Done, job, job_stopped
from tests.services.bucket import Bucket
from tests.services.hub import Hub
from tests.services.openrouter import OpenRouter

ALL = ["preflight", "data", "baseline", "train", "finetuned", "reference", "judge", "report"]
KEY = "sk-or-a-key-that-must-not-be-seen"
TOKEN = "hf_" + "aTokenThatMustNotBeSeen" * 2


@dataclass(frozen=True)
class Finished:
    """A finished run in a folder, and the command that made it."""

    arguments: tuple[str, ...]
    done: Done
    folder: Path

    @property
    def results(self) -> Results:
        return Results.model_validate_json((self.folder / "results.json").read_bytes())


SHORT = (
    "--set", "train.epochs=1", "--set", "train.checkpoint_every=5",
    "--set", "evals.dialogue.examples=10", "--set", "evals.dialogue.max_new_tokens=8",
    "--set", "evals.side_by_side.examples=10", "--set", "evals.side_by_side.max_new_tokens=8",
)  # fmt: skip
"""Makes `smoke` quicker, with a model of two blocks; the slow tests run it as it is shipped.

Both kinds of answers are as long, to the same prompts: one program generates them.
"""


def made_by_models(folder: Path) -> dict[str, bytes]:
    """The adapter and every prediction of a run."""
    paths = [*folder.rglob("adapter/*.h5"), *folder.rglob("predictions.jsonl")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def only_run(output: Path) -> Path:
    (run,) = (path for path in output.iterdir() if path.name != "datasets")
    return run


@pytest.fixture(scope="module")
def short(two_blocks: str) -> tuple[str, ...]:
    return *SHORT, "--set", f"model.preset={two_blocks}"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory, short: tuple[str, ...]) -> Finished:
    """`job run smoke`, shortened and not interrupted."""
    output = tmp_path_factory.mktemp("smoke")
    arguments = ("run", "smoke", "--output", str(output), *short)
    done = job(*arguments)
    assert done.code == 0, done.err
    return Finished(arguments, done, only_run(output))


def test_smoke_runs_every_stage_and_ends_with_the_verdict(smoke: Finished) -> None:
    assert smoke.done.stages("stage done") == ALL[1:]
    messages = [event["message"] for event in smoke.done.events]
    assert any(message.startswith("verdict: Fine-tuning ") for message in messages)
    assert f"results: {smoke.folder}/results.json" in messages
    assert smoke.done.err == ""


def test_every_documented_file_is_there_with_its_checksum(smoke: Finished) -> None:
    artifacts = {item.path: item for item in smoke.results.artifacts}
    expected = {
        "spec.yaml", "report.html", "report.md", "data/manifest.json", "data/train.parquet",
        "data/validation.parquet", "train/history.jsonl", "adapter/adapter.lora.h5",
        "adapter/adapter.json", "adapter/README.md", "adapter/chat_template.jinja",
        "adapter/peft/adapter_config.json",
        "adapter/peft/adapter_model.safetensors",
        "evals/contamination.json", TRAINING + EVENTS,
        *(f"evals/{model}/{name}/predictions.jsonl" for model in ("baseline", "finetuned")
          for name in ("questions", "questions-generated", "dialogue", "loss", "side_by_side")),
        *(f"stages/{stage}.json" for stage in ALL),
    }  # fmt: skip
    assert set(artifacts) == expected
    for path, item in artifacts.items():
        content = (smoke.folder / path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (item.bytes, item.sha256)
    assert {path.stem for path in (smoke.folder / "stages").iterdir()} == set(ALL)
    log = [json.loads(line) for line in (smoke.folder / "logs/job.jsonl").open()]
    assert [line["message"] for line in log] == [e["message"] for e in smoke.done.events]


def test_accuracies_follow_from_the_predictions(smoke: Finished) -> None:
    for task in smoke.results.evaluation.multiple_choice:
        for model, score in task.models.items():
            path = smoke.folder / f"evals/{model}/{task.name}/predictions.jsonl"
            lines = [json.loads(line) for line in path.open()]
            right = sum(line["choice"] == line["gold"] for line in lines)
            assert (right, len(lines)) == (score.correct, task.questions)
            assert score.accuracy == right / len(lines)
        assert task.rows is not None
        assert (task.rows.raw, task.rows.valid, task.rows.dropped) == (len(lines), len(lines), {})


def test_training_lowers_the_validation_loss(smoke: Finished) -> None:
    loss = smoke.results.training.loss
    assert loss.validation_before is not None
    assert loss.validation_after is not None
    assert loss.validation_after < loss.validation_before - 0.5
    measured = smoke.results.evaluation.loss
    assert measured is not None
    assert measured.models["baseline"].mean == pytest.approx(loss.validation_before, abs=1e-5)
    assert measured.models["finetuned"].mean == pytest.approx(loss.validation_after, abs=1e-5)
    assert measured.lower.count == measured.examples == 20
    assert smoke.results.training.tokens.trained <= smoke.results.training.tokens.padded
    assert smoke.results.reference.status == "skipped"
    assert smoke.results.reference.reason == "OPENROUTER_API_KEY is not set"


def test_same_command_skips_every_stage_and_says_so(smoke: Finished) -> None:
    before = {p: p.stat().st_mtime_ns for p in smoke.folder.rglob("*") if p.is_file()}
    done = job(*smoke.arguments)
    assert done.code == 0
    assert done.stages("stage skipped") == ALL
    assert any(event["message"].startswith("verdict: ") for event in done.events)
    assert {p: p.stat().st_mtime_ns for p in smoke.folder.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_missing_spec_and_damaged_results_are_written_again(smoke: Finished) -> None:
    complete = (smoke.folder / "results.json").read_bytes()
    (smoke.folder / "spec.yaml").unlink()
    (smoke.folder / "results.json").write_bytes(complete[:500])
    done = job(*smoke.arguments)
    assert done.code == 0, done.err
    assert done.stages("stage done") == ["report"]
    fetched = job("fetch", str(smoke.folder), str(smoke.folder.parent.parent / "fetched"))
    assert fetched.code == 0, fetched.err
    assert smoke.results.verdict == Results.model_validate_json(complete).verdict


@pytest.mark.slow
def test_a_job_stopped_during_the_baseline_resumes(tmp_path: Path, short: tuple[str, ...]) -> None:
    arguments = ("run", "smoke", "--output", str(tmp_path), "--until", "baseline", *short)
    stopped = job_stopped(
        *arguments, when=lambda e: e["message"] == "task evaluated", number=signal.SIGTERM
    )
    assert stopped.code == 75
    assert stopped.err == "error: stopped by SIGTERM; run the same command to resume\n"
    assert not (only_run(tmp_path) / "stages/baseline.json").exists()
    done = job(*arguments)
    assert done.code == 0, done.err
    assert done.stages("stage done") == ["baseline"]
    assert done.events[-1]["message"] == "stopped before the report, as requested"


@pytest.mark.slow
def test_a_job_killed_in_training_ends_with_the_same_bytes(tmp_path: Path) -> None:
    unbroken = job("run", "smoke", "--output", str(tmp_path / "unbroken"))
    assert unbroken.code == 0, unbroken.err
    arguments = ("run", "smoke", "--output", str(tmp_path / "killed"))
    killed = job_stopped(*arguments, when=lambda e: e.get("step") == 30, number=signal.SIGKILL)
    assert killed.code == -signal.SIGKILL
    folder = only_run(tmp_path / "killed")
    assert not (folder / "results.json").exists()
    done = job(*arguments)
    assert done.code == 0, done.err
    resumed = [e for e in done.events if e["message"] == "resumed from a checkpoint"]
    assert [event["step"] for event in resumed] == [20]
    assert done.stages("stage skipped") == ["data", "baseline"]
    assert made_by_models(folder) == made_by_models(only_run(tmp_path / "unbroken"))
    results = Results.model_validate_json((folder / "results.json").read_bytes())
    assert results.run.resumes == 1


@pytest.mark.slow
def test_changed_evals_run_again_and_training_does_not(smoke: Finished) -> None:
    before = smoke.results
    changes = ("--set", "evals.multiple_choice.1.limit=10", "--set", "evals.dialogue=null")
    done = job(*smoke.arguments, *changes)
    assert done.code == 0, done.err
    assert done.stages("stage skipped") == ["data", "train"]
    assert done.stages("stage done") == ["baseline", "finetuned", "reference", "judge", "report"]
    after = smoke.results
    assert after.run.id == before.run.id
    assert after.evaluation.multiple_choice[1].questions == 10
    assert after.evaluation.multiple_choice[0].models == before.evaluation.multiple_choice[0].models
    assert after.evaluation.dialogue is None
    assert after.training == before.training


@pytest.fixture
def services() -> Iterator[tuple[Hub, Bucket, OpenRouter]]:
    def answer(chat: dict) -> str:
        return "The answer is B." if "letter" in chat["messages"][-1]["content"] else "Do rest."

    with Hub(TOKEN) as hub, Bucket("runs") as bucket, OpenRouter(answer, KEY) as router:
        yield hub, bucket, router


@pytest.mark.slow
def test_a_job_from_hub_to_bucket_equals_the_local_one(
    services: tuple[Hub, Bucket, OpenRouter], tmp_path: Path
) -> None:
    from job.model.tiny import tiny_preset

    hub, bucket, router = services
    samples = resources.files("job") / "samples"
    data_commit = hub.add_repo(
        "datasets", "clinic/dialogues", {"data.jsonl": (samples / "dialogues.jsonl").read_bytes()}
    )
    preset = tiny_preset()
    model_commit = hub.add_repo(
        "models",
        "clinic/tiny",
        {
            p.relative_to(preset).as_posix(): p.read_bytes()
            for p in preset.rglob("*")
            if p.is_file()
        },
        gated=True,
    )
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN,
        "STORAGE_EMULATOR_HOST": bucket.url, "OPENROUTER_API_KEY": KEY,
    }  # fmt: skip
    short = ("--set", "train.epochs=1", "--set", "evals.dialogue=null")
    arguments = (
        "run", "smoke", "--output", "gs://runs/here", "--run-id", "r", *short,
        "--set", "data.dataset=hf://clinic/dialogues", "--set", "model.preset=hf://clinic/tiny",
        "--set", "model.chat_template=gemma",  # the template of `tiny`
        "--set", f"reference.base_url={router.url}/api/v1",
        "--set", "reference.attempts=1", "--set", "reference.concurrency=1",
    )  # fmt: skip

    stopped = job_stopped(
        *arguments,
        when=lambda e: e.get("step") == 1,
        number=signal.SIGTERM,
        environment=environment,
    )
    assert stopped.code == 75, stopped.err
    assert "run the same command to resume" in stopped.err
    assert "here/r/results.json" not in bucket.names("runs")
    checkpoints = [n for n in bucket.names("runs") if n.startswith("here/r/train/checkpoints/")]
    assert len(checkpoints) == 1

    # The branch moves on; the run does not. And the endpoint is down for a while.
    rows = (samples / "dialogues.jsonl").read_bytes().splitlines(keepends=True)
    hub.add_repo("datasets", "clinic/dialogues", {"data.jsonl": b"".join(rows[5:])})
    router.script.extend(["502"] * 6)
    done = job(*arguments, environment=environment)
    assert done.code == 0, done.err
    assert any(event["message"] == "resumed from a checkpoint" for event in done.events)
    partial = Results.model_validate_json(bucket.objects["runs", "here/r/results.json"].data)
    assert (partial.reference.status, partial.reference.requests) == ("partial", 22)
    chats = len(router.chats)
    again = job(*arguments, environment=environment)
    assert again.code == 0, again.err
    assert again.stages("stage done") == ["reference", "report"]
    assert len(router.chats) - chats == partial.reference.failed

    fetched = job("fetch", "gs://runs/here/r", str(tmp_path / "copy"), environment=environment)
    assert fetched.code == 0, fetched.err
    results = Results.model_validate_json((tmp_path / "copy/results.json").read_bytes())
    assert results.model.revision == model_commit
    assert results.data.revision == data_commit
    reference = results.reference
    assert (reference.status, reference.local, reference.requests) == (
        "complete",
        False,
        22 + partial.reference.failed,
    )
    assert reference.cost_usd > 0
    asked = results.evaluation.multiple_choice[1].models["reference"]
    assert asked.letters == {"B": 20}
    assert results.evaluation.side_by_side[0].answers["reference"] == "Do rest."

    local = job("run", "smoke", "--output", str(tmp_path / "local"), *short)
    assert local.code == 0, local.err
    ours = made_by_models(tmp_path / "copy")
    theirs = made_by_models(only_run(tmp_path / "local"))
    assert {key: ours[key] for key in theirs} == theirs

    everything = b"".join(stored.data for stored in bucket.objects.values())
    for text in (everything, stopped.out.encode(), done.out.encode(), done.err.encode()):
        assert KEY.encode() not in text
        assert TOKEN.encode() not in text
