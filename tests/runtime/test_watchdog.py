"""A progress line comes at least each minute, and a stalled job is ended."""

import io
import json
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import structlog

from job.runtime import logs, watchdog
from job.runtime.watchdog import Watchdog
from tests.command import job
from tests.services.hub import Hub


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The log of a watchdog that is a hundred times faster."""
    monkeypatch.setattr(watchdog, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(watchdog, "LINE_SECONDS", 0.3)
    stream = io.StringIO()
    logs.configure(stream=stream)
    yield stream
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def left(*_: object) -> None:
    raise AssertionError("the job was considered stalled")


def test_lines_have_the_stage_and_the_throughput(stream: io.StringIO) -> None:
    monitor = Watchdog()
    monitor.stage = "train"
    structlog.contextvars.bind_contextvars(run_id="doctor-1")
    with monitor.watching(None, left), monitor.task("training", 90, 40):
        while not stream.getvalue():
            monitor.advance(2, loss=1.5)
            time.sleep(0.05)
    line, *_ = lines(stream)
    done = line.pop("done")
    assert done > 40
    assert line.pop("per_second") == pytest.approx((done - 40) / 0.3, abs=0.01)
    assert {key: line[key] for key in ("message", "stage", "task", "of", "loss", "run_id")} == {
        "message": "working", "stage": "train", "task": "training", "of": 90, "loss": 1.5,
        "run_id": "doctor-1",
    }  # fmt: skip


def test_lines_come_without_progress(stream: io.StringIO) -> None:
    monitor = Watchdog()
    monitor.stage = "baseline"
    with monitor.watching(None, left):
        time.sleep(0.8)
    assert {line["stage"] for line in lines(stream)} == {"baseline"}
    assert "task" not in lines(stream)[0]


def test_the_heartbeat_file_has_the_time_of_progress(
    stream: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "heartbeat"
    monkeypatch.setenv("JOB_HEARTBEAT_FILE", str(file))
    monitor = Watchdog()
    with monitor.watching(None, left):
        time.sleep(0.1)
        assert time.time() - file.stat().st_mtime < 60
        monkeypatch.setattr(watchdog, "_TICK_SECONDS", 100.0)
        time.sleep(0.1)
    assert time.time() - file.stat().st_mtime > 60


def test_slow_progress_is_not_a_stall(stream: io.StringIO) -> None:
    monitor, stalls = Watchdog(), []
    with monitor.watching(1 / 60, lambda *told: stalls.append(told)):
        with monitor.task("slow", None, 0):
            for _ in range(40):
                time.sleep(0.05)
                monitor.advance()
        assert stalls == []
        while not stalls:  # without progress it is one
            time.sleep(0.05)


@pytest.mark.slow
def test_a_stalled_job_exits_4_and_logs_its_stacks(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    rows = (resources.files("job") / "samples/dialogues.jsonl").read_bytes()
    with Hub() as hub:
        hub.add_repo("datasets", "clinic/dialogues", {"data.jsonl": rows})
        hub.faults.add("GET /datasets/clinic/dialogues/resolve", spoil="stall", times=9)
        done = job(
            "run", "smoke", "--until", "data", "--run-id", "r", "--output", str(tmp_path),
            "--set", "data.dataset=hf://clinic/dialogues", "--set", "runtime.stall_minutes=0.2",
            environment={"HF_ENDPOINT": hub.url, "JOB_STALL_SECONDS": "500", "JOB_CACHE": cache},
        )  # fmt: skip
    assert done.code == 4, done.out + done.err
    assert "no progress for 0.2 minutes (runtime.stall_minutes)" in done.err
    (event,) = (e for e in done.events if e["message"] == "stalled")
    assert (event["severity"], event["stage"]) == ("ERROR", "data")
    assert "thread MainThread:" in event["stacks"]
    assert "in http_get" in event["stacks"]
    assert "stalled" in (tmp_path / "r/logs/job.jsonl").read_text()
