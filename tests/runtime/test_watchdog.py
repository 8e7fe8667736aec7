"""A line comes at least each minute, and a job in which nothing moves is ended."""

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
    """The log, with a pulse a hundred times as fast as it is."""
    monkeypatch.setattr(watchdog, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(watchdog, "LINE_SECONDS", 0.3)
    stream = io.StringIO()
    logs.configure(logs.RunLog(), stream)
    yield stream
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def left(*_: object) -> None:
    raise AssertionError("the job was taken to hang")


def test_lines_say_where_the_job_is_and_how_fast(stream: io.StringIO) -> None:
    beating = Watchdog()
    beating.stage = "train"
    structlog.contextvars.bind_contextvars(run_id="doctor-1")
    with beating.watching(None, left), beating.task("training", 90, 40):
        for _ in range(10):
            beating.advance(2, {"loss": 1.5})
            time.sleep(0.05)
    (line,) = lines(stream)
    done = line.pop("done")
    assert 40 < done < 60
    assert line.pop("per_second") == pytest.approx((done - 40) / 0.3, abs=0.01)
    assert {key: line[key] for key in ("message", "stage", "task", "of", "loss", "run_id")} == {
        "message": "working", "stage": "train", "task": "training", "of": 90, "loss": 1.5,
        "run_id": "doctor-1",
    }  # fmt: skip


def test_lines_come_where_no_step_ends(stream: io.StringIO) -> None:
    beating = Watchdog()
    beating.stage = "baseline"
    with beating.watching(None, left):
        time.sleep(0.8)
    assert [line["stage"] for line in lines(stream)] == ["baseline", "baseline"]
    assert "task" not in lines(stream)[0]


def test_the_heartbeat_file_tells_when_something_last_got_on(
    stream: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "heartbeat"
    monkeypatch.setenv("JOB_HEARTBEAT_FILE", str(file))
    beating = Watchdog()
    with beating.watching(None, left):
        time.sleep(0.1)
        assert time.time() - file.stat().st_mtime < 60
        monkeypatch.setattr(watchdog, "_TICK_SECONDS", 100.0)
        time.sleep(0.1)
    assert time.time() - file.stat().st_mtime > 60


def test_a_job_that_moves_is_not_ended(stream: io.StringIO) -> None:
    beating = Watchdog()
    with beating.watching(0.2 / 60, left), beating.task("slow", None, 0):
        for _ in range(10):
            time.sleep(0.05)
            beating.advance(1, {})


@pytest.mark.slow
def test_a_job_in_which_nothing_moves_exits_4_and_shows_where_it_hangs(tmp_path: Path) -> None:
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
    assert "nothing got on for 0.2 minutes (runtime.stall_minutes)" in done.err
    (event,) = (e for e in done.events if e["message"] == "the job hangs")
    assert (event["severity"], event["stage"]) == ("ERROR", "data")
    assert "thread MainThread:" in event["stacks"]
    assert "in _append" in event["stacks"]
    kept = (tmp_path / "r/logs/job.jsonl").read_text()
    assert "the job hangs" in kept
