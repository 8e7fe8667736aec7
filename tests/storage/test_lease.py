"""Only one process works on a run: others are refused, and take over from one that is gone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job.errors import RunStoppedError
from job.storage.base import Store
from job.storage.lease import LEASE_KEY, Lease, LeaseHeldError, LeaseRecord
from job.storage.locations import open_store
from tests.command import COMMAND, job


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("JOB_LEASE_SECONDS", "0.6")
    if request.param == "folder":
        return open_store(str(tmp_path / "run"))
    request.getfixturevalue("bucket")
    return open_store("gs://runs/run")


def take(store: Store, lost: list[str] | None = None) -> Lease:
    lease = Lease(store, "the run r", (lost if lost is not None else []).append)
    lease.take()
    return lease


def test_a_second_writer_is_refused_and_told_who_is_at_work(store: Store) -> None:
    with Lease(store, "the run r", lambda why: None):
        with pytest.raises(
            LeaseHeldError, match="the run r is in use by another process"
        ) as refused:
            take(store)
        assert refused.value.exit_code == 75
        time.sleep(1.0)  # longer than it lasts: it was renewed
        with pytest.raises(LeaseHeldError):
            take(store)
    assert store.read(LEASE_KEY) is None
    take(store).release()


def test_what_has_expired_is_taken_over_and_its_owner_notices(store: Store) -> None:
    lost: list[str] = []
    first = take(store, lost)
    time.sleep(0.7)
    with pytest.raises(RunStoppedError, match="lease of the run r was lost"):
        first.check()
    second = take(store)
    first.renew()
    assert lost == ["a lost lease"]
    first.release()
    held = LeaseRecord.model_validate_json(store.read(LEASE_KEY) or b"")
    assert held.owner == second._owner
    second.check()
    second.release()


@pytest.mark.parametrize("seconds_off", [-600, 3600])
def test_a_wrong_clock_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, seconds_off: int
) -> None:
    right = time.time
    with monkeypatch.context() as clock:
        clock.setattr(time, "time", lambda: right() + seconds_off)
        take(store)
    with pytest.raises(LeaseHeldError, match=r"which renewed its lease \d s ago"):
        take(store)
    time.sleep(0.7)
    take(store).release()
    assert store.list() == []


def test_a_dead_process_of_this_machine_holds_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_LEASE_SECONDS", "600")
    code = (
        "import sys\nfrom job.storage.lease import Lease\n"
        "from job.storage.locations import open_store\n"
        "Lease(open_store(sys.argv[1]), 'the run', print).take()"
    )
    subprocess.run([sys.executable, "-c", code, store.uri], check=True, timeout=60)
    assert store.read(LEASE_KEY) is not None
    take(store).release()


def test_a_lease_that_cannot_be_read_is_taken_over(store: Store) -> None:
    store.write(LEASE_KEY, b"{")
    take(store).release()
    assert store.read(LEASE_KEY) is None


def test_of_many_that_try_at_once_one_gets_it(store: Store) -> None:
    version = store.write_if_version("other", b"0", None)
    assert version is not None
    assert store.write_if_version("other", b"1", None) is None
    assert store.write_if_version("other", b"1", version) is not None
    assert store.write_if_version("other", b"2", version) is None
    assert store.read("other") == b"1"


def started(output: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """`job run smoke` to the end of its data, begun and stopped in the middle by SIGSTOP."""
    process = subprocess.Popen(
        [*COMMAND, "run", "smoke", "--until", "data", "--run-id", "r", "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["message"] == "stage started":
            break
    process.send_signal(signal.SIGSTOP)
    return process


def test_two_jobs_with_one_run_id_one_runs_and_one_refuses(tmp_path: Path) -> None:
    arguments = ("run", "smoke", "--until", "data", "--run-id", "r", "--output", str(tmp_path))
    with started(tmp_path, {}) as first:
        second = job(*arguments)
        assert second.code == 75, second.err
        assert "error: the run r is in use by another process" in second.err
        assert "or use another --run-id" in second.err
        first.send_signal(signal.SIGCONT)
        _, err = first.communicate(timeout=60)
        assert first.returncode == 0, err
    assert not (tmp_path / "r" / LEASE_KEY).exists()


def test_a_process_that_was_away_too_long_gives_up_and_changes_nothing(tmp_path: Path) -> None:
    arguments = ("run", "smoke", "--until", "data", "--run-id", "r", "--output", str(tmp_path))
    environment = {"JOB_LEASE_SECONDS": "1"}
    with started(tmp_path, environment) as first:
        time.sleep(1.2)
        second = job(*arguments, environment=environment)
        assert second.code == 0, second.err
        marker = (tmp_path / "r/stages/data.json").read_bytes()
        first.send_signal(signal.SIGCONT)
        _, err = first.communicate(timeout=60)
        assert first.returncode == 75, err
        assert "run the same command to resume" in err
    assert (tmp_path / "r/stages/data.json").read_bytes() == marker
