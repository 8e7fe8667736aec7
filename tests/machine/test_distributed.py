"""Two processes as one job: the result of one, and together in every way of leaving."""

import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from job.errors import SetupError
from job.machine.distributed import join_processes
from job.spec.schema import Runtime
from tests.command import COMMAND

SHORT = (
    "run", "smoke", "--until", "train", "--run-id", "r", "--set", "train.checkpoint_every=3",
    "--set", "train.log_every=1", "--set", "train.batch_size=8", "--set", "evals.dialogue=null",
    "--set", "evals.multiple_choice=[]", "--set", "evals.side_by_side.examples=0",
    "--set", "reference=null", "--set", "train.optimizer=sgd", "--set", "train.learning_rate=0.5",
    "--set", "train.validate_every=4", "--set", "train.epochs=2",
)  # fmt: skip
LOST = "lost the connection to another process; run the same command to resume"
ATTEMPTS = 3
"""How often the same command is run if processes lose each other."""
LINES = 16
"""Fewer than a resumed run logs."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


Begin = Callable[..., list[subprocess.Popen[bytes]]]


@pytest.fixture(scope="module")
def begin(two_blocks: str) -> Begin:
    """Starts the processes of one job, eight devices in all."""
    return functools.partial(begin_processes, two_blocks)


def begin_processes(
    preset: str, output: Path, arguments: Sequence[str] = SHORT, *, count: int = 2
) -> list[subprocess.Popen[bytes]]:
    output.parent.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    started = []
    for index in range(count):
        environment = os.environ | {
            # Compiled quickly, neither process waits long for the other.
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={8 // count}",
            "JAX_PLATFORMS": "cpu",
        }
        if count > 1:
            environment |= {
                "JOB_COORDINATOR_ADDRESS": address,
                "JOB_PROCESS_COUNT": str(count),
                "JOB_PROCESS_INDEX": str(index),
            }
        log = (output.parent / f"{output.name}.{index}.log").open("ab")
        model = ("--set", f"model.preset={preset}")
        command = [*COMMAND, *arguments, *model, "--output", str(output)]
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
    path = output.parent / f"{output.name}.{index}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def logs_of(output: Path) -> str:
    return log_of(output, 0) + log_of(output, 1)


def one_was_slow(codes: list[int], output: Path, before: int) -> bool:
    """Tell whether a process lost the other, as may happen under load: Gloo waits 30 seconds.

    The one that waited says to run the same command. The slow one ends with it, or JAX ends it.
    """
    return 75 in codes and 0 not in codes and logs_of(output).count(LOST) > before


def begin_until(
    begin: Begin, output: Path, text: str, times: int = 1
) -> list[subprocess.Popen[bytes]]:
    """Begin, and wait until the primary has logged so many more lines with this text."""
    for _ in range(ATTEMPTS):
        lost, count = logs_of(output).count(LOST), log_of(output, 0).count(text) + times
        both = begin(output)
        until = time.monotonic() + 240
        while all(process.poll() is None for process in both):
            if log_of(output, 0).count(text) >= count:
                return both
            assert time.monotonic() < until, logs_of(output)
            time.sleep(0.05)
        if not one_was_slow(ended(both, 60), output, lost):
            break
    raise AssertionError(logs_of(output))


def finish(begin: Begin, output: Path) -> None:
    """Run to the end."""
    for _ in range(ATTEMPTS):
        lost = logs_of(output).count(LOST)
        if (codes := ended(begin(output))) == [0, 0]:
            return
        if not one_was_slow(codes, output, lost):
            break
    raise AssertionError(logs_of(output))


def adapter(output: Path) -> bytes:
    return (output / "r/adapter/adapter.lora.h5").read_bytes()


def losses(output: Path) -> list[float]:
    lines = (output / "r/train/history.jsonl").read_text().splitlines()
    return [line.get("loss", line.get("validation_loss")) for line in map(json.loads, lines)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, begin: Begin) -> Path:
    """The output of two processes that nothing disturbed."""
    output = tmp_path_factory.mktemp("two") / "runs"
    finish(begin, output)
    return output


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path, unbroken: Path, begin: Begin) -> None:
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
    tmp_path: Path, unbroken: Path, begin: Begin
) -> None:
    output = tmp_path / "runs"
    for one, number in (
        (1, signal.SIGTERM), (0, signal.SIGTERM), (1, signal.SIGKILL), (0, signal.SIGKILL)
    ):  # fmt: skip
        both = begin_until(begin, output, '"message": "step"')
        both[one].send_signal(number)
        codes, logs = ended(both, 60), logs_of(output)
        if number == signal.SIGTERM:
            assert codes == [75, 75], logs
        else:
            assert codes[one] == -signal.SIGKILL
            assert codes[1 - one] == 75 if one == 1 else codes[1 - one] != 0, logs
        assert not (output / "r/adapter").exists()
    finish(begin, output)
    assert log_of(output, 0).count("resumed from a checkpoint") >= 3
    assert adapter(output) == adapter(unbroken)


@pytest.mark.slow
def test_processes_killed_at_random_end_with_the_same_bytes(
    tmp_path: Path, unbroken: Path, begin: Begin
) -> None:
    seed = random.randrange(2**32)
    sys.stdout.write(f"seed {seed}\n")
    chance = random.Random(seed)
    output = tmp_path / "runs"
    for _ in range(int(os.environ.get("KILL_ROUNDS", "1"))):
        both = begin_until(begin, output, '"message"', chance.randrange(1, LINES))
        time.sleep(chance.uniform(0, 1))
        for process in chance.sample(both, 2):
            process.kill()
        ended(both, 10)
    finish(begin, output)
    assert adapter(output) == adapter(unbroken)


@pytest.mark.slow
def test_a_failure_is_reported_by_the_other_process(tmp_path: Path, begin: Begin) -> None:
    output = tmp_path / "runs"
    broken = (*SHORT, "--set", "data.prompt='{nothing}'")
    assert ended(begin(output, broken), 120) == [2, 2]
    assert "no column 'nothing'" in log_of(output, 0)
    assert "process 0 has exited: data: none of" in log_of(output, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JOB_PROCESS_COUNT": "two", "JOB_PROCESS_INDEX": "0"}, "must be numbers.*'two'"),
        ({"JOB_PROCESS_COUNT": "2"}, "must be numbers.*'2' and ''"),
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


@pytest.mark.parametrize("index", [0, 1])
def test_processes_that_do_not_all_join_are_named(index: int) -> None:
    program = (
        "from job.machine import distributed\n"
        "from job.spec.schema import Runtime\n"
        "distributed.JOIN_SECONDS = 2\n"
        "distributed.join_processes(Runtime())"
    )
    variables = {
        "JOB_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JOB_PROCESS_COUNT": "2",
        "JOB_PROCESS_INDEX": str(index),
    }
    command = [sys.executable, "-c", program]
    alone = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=60
    )
    assert alone.returncode == 3
    last = alone.stderr.splitlines()[-1]
    assert last.startswith(f"error: process {index} of 2: not all processes of the job connected")


def test_a_process_without_an_address_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOB_COORDINATOR_ADDRESS", raising=False)
    assert join_processes(Runtime()).count == 1
