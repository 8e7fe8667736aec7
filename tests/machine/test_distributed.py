"""Two processes as one job: the result of one, and together in every way of leaving."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from job.errors import SetupError
from job.machine.distributed import join_processes
from job.spec.schema import Runtime
from tests.command import COMMAND, SLOWER

SHORT = (
    "run", "smoke", "--until", "train", "--run-id", "r", "--set", "train.checkpoint_every=3",
    "--set", "train.log_every=1", "--set", "train.batch_size=8", "--set", "evals.dialogue=null",
    "--set", "evals.multiple_choice=[]", "--set", "evals.side_by_side.examples=0",
    "--set", "reference=null", "--set", "train.optimizer=sgd", "--set", "train.learning_rate=0.5",
    "--set", "train.validate_every=4", "--set", "train.epochs=2",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def begin(output: Path, arguments: Sequence[str] = SHORT, *, count: int = 2) -> list:
    """Start the processes of one job, four devices each."""
    output.parent.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    started = []
    for index in range(count):
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}",
            "JAX_PLATFORMS": "cpu",
        }
        if count > 1:
            environment |= {
                "JOB_COORDINATOR_ADDRESS": address,
                "JOB_PROCESS_COUNT": str(count),
                "JOB_PROCESS_INDEX": str(index),
            }
        log = (output.parent / f"{output.name}.{index}.log").open("ab")
        command = [*COMMAND, *arguments, "--output", str(output)]
        started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    return started


def ended(processes: list, seconds: float = 480) -> list[int]:
    """Their exit codes; all must end in time."""
    until = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, until - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def log_of(output: Path, index: int) -> str:
    return (output.parent / f"{output.name}.{index}.log").read_text(errors="replace")


def wait_for(output: Path, index: int, text: str, processes: list) -> None:
    until = time.monotonic() + 200
    while text not in log_of(output, index):
        assert time.monotonic() < until, log_of(output, index)
        assert all(process.poll() is None for process in processes), log_of(output, index)
        time.sleep(0.05)


def wait_for_a_step(output: Path, processes: list) -> None:
    """Until the leader has logged one more step than before they began."""
    step = '"message": "step"'
    before = log_of(output, 0).count(step)
    until = time.monotonic() + 240
    while log_of(output, 0).count(step) == before:
        assert time.monotonic() < until, log_of(output, 0)
        assert all(process.poll() is None for process in processes), log_of(output, 0)
        time.sleep(0.1)


def adapter(output: Path) -> bytes:
    return (output / "r/adapter/adapter.lora.h5").read_bytes()


def losses(output: Path) -> list[float]:
    lines = (output / "r/train/history.jsonl").read_text().splitlines()
    return [line.get("loss", line.get("validation_loss")) for line in map(json.loads, lines)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two processes that nothing disturbed."""
    output = tmp_path_factory.mktemp("two") / "runs"
    assert ended(begin(output)) == [0, 0], log_of(output, 0) + log_of(output, 1)
    return output


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path, unbroken: Path) -> None:
    alone = tmp_path / "runs"
    assert ended(begin(alone, count=1)) == [0], log_of(alone, 0)
    np.testing.assert_allclose(losses(unbroken), losses(alone), rtol=1e-5)
    file = "r/adapter/adapter.lora.h5"
    with h5py.File(unbroken / file) as ours, h5py.File(alone / file) as theirs:
        names: list[str] = []
        theirs.visit(names.append)
        arrays = [name for name in names if "lora_kernel" in name]
        assert arrays
        for name in arrays:
            np.testing.assert_allclose(ours[name][()], theirs[name][()], atol=1e-5)
    marker = json.loads((unbroken / "r/stages/train.json").read_text())
    assert marker["environment"]["processes"] == 2
    assert marker["environment"]["devices"] == 8
    follower = log_of(unbroken, 1)
    assert '"severity": "INFO"' not in follower


@pytest.mark.slow
def test_stopped_or_killed_processes_resume_to_the_same_bytes(
    tmp_path: Path, unbroken: Path
) -> None:
    output = tmp_path / "runs"
    for one, number in (
        (1, signal.SIGTERM), (0, signal.SIGTERM), (1, signal.SIGKILL), (0, signal.SIGKILL)
    ):  # fmt: skip
        both = begin(output)
        wait_for_a_step(output, both)
        both[one].send_signal(number)
        sent = time.monotonic()
        codes = ended(both, 60)
        logs = log_of(output, 0) + log_of(output, 1)
        if number == signal.SIGTERM:
            assert codes == [75, 75], logs
            assert time.monotonic() - sent < 10 * SLOWER
        else:
            assert codes[one] == -signal.SIGKILL
            assert codes[1 - one] == 75 if one == 1 else codes[1 - one] != 0, logs
        assert not (output / "r/adapter").exists()
    assert ended(begin(output)) == [0, 0], log_of(output, 0) + log_of(output, 1)
    assert log_of(output, 0).count("resumed from a checkpoint") >= 3
    assert adapter(output) == adapter(unbroken)


@pytest.mark.slow
def test_processes_killed_at_random_end_with_the_same_bytes(tmp_path: Path, unbroken: Path) -> None:
    seed = random.randrange(2**32)
    sys.stdout.write(f"seed {seed}\n")
    chance = random.Random(seed)
    output = tmp_path / "runs"
    for _ in range(int(os.environ.get("KILL_ROUNDS", "1"))):
        both = begin(output)
        wait_for(output, 0, "stage started", both)
        time.sleep(chance.uniform(5, 25))
        for process in chance.sample(both, 2):
            process.kill()
        ended(both, 10)
    assert ended(begin(output)) == [0, 0], log_of(output, 0) + log_of(output, 1)
    assert adapter(output) == adapter(unbroken)


@pytest.mark.slow
def test_a_failure_is_reported_by_the_other_process(tmp_path: Path) -> None:
    output = tmp_path / "runs"
    broken = (*SHORT, "--set", "data.prompt='{nothing}'")
    assert ended(begin(output, broken), 120) == [2, 2]
    assert "no column 'nothing'" in log_of(output, 0)
    assert "process 0 has exited: data: none of" in log_of(output, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JOB_PROCESS_COUNT": "two", "JOB_PROCESS_INDEX": "0"}, "must be numbers.*'two'"),
        ({"JOB_PROCESS_COUNT": "2"}, "must be numbers.*None"),
        ({"JOB_PROCESS_COUNT": "2", "JOB_PROCESS_INDEX": "2"}, "process 2 is not one of 2"),
    ],
)
def test_incomplete_addresses_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in ("JOB_PROCESS_COUNT", "JOB_PROCESS_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JOB_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match=message):
        join_processes(Runtime())


def test_a_process_without_an_address_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOB_COORDINATOR_ADDRESS", raising=False)
    assert join_processes(Runtime()).count == 1
    monkeypatch.setenv("JOB_COORDINATOR_ADDRESS", "127.0.0.1:1")
    assert join_processes(Runtime(distributed="off")).count == 1
