"""Training that is killed again and again, anywhere, ends with the bytes of an unbroken one.

`KILL_ROUNDS=4 uv run pytest -m slow tests/pipeline/test_kills.py` kills it more often.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command import COMMAND, job

SHORT = (
    "run", "smoke", "--until", "train", "--run-id", "r", "--set", "train.checkpoint_every=4",
    "--set", "train.log_every=1", "--set", "train.validate_every=9", "--set", "train.epochs=2",
    "--set", "evals.dialogue=null", "--set", "evals.multiple_choice=[]",
    "--set", "evals.side_by_side.examples=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def command(two_blocks: str) -> tuple[str, ...]:
    """The arguments of a job, without its output."""
    return *SHORT, "--set", f"model.preset={two_blocks}", "--output"


@pytest.fixture(scope="module")
def unbroken(
    command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, float]:
    """The adapter of a run that is not killed, and the seconds of one that compiles nothing."""
    folder = tmp_path_factory.mktemp("unbroken")
    for name in ("compiling", "whole"):
        clock = time.monotonic()
        done = job(*command, str(folder / name))
        assert done.code == 0, done.err
    seconds = time.monotonic() - clock
    return (folder / "whole/r/adapter/adapter.lora.h5").read_bytes(), seconds


def kill_after(
    command: tuple[str, ...], output: Path, seconds: float, number: signal.Signals
) -> int:
    """Start the job, send the signal after some time, and return its exit code."""
    with (output.parent / "log").open("ab") as log:
        process = subprocess.Popen([*COMMAND, *command, str(output)], stdout=log, stderr=log)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        return process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGKILL, 2), (signal.SIGTERM, 1)], ids=["SIGKILL", "SIGTERM"]
)
def test_training_killed_at_random_ends_with_the_same_adapter(
    tmp_path: Path,
    command: tuple[str, ...],
    unbroken: tuple[bytes, float],
    number: signal.Signals,
    times: int,
) -> None:
    times *= int(os.environ.get("KILL_ROUNDS", "1"))
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    sys.stdout.write(f"seed {seed}\n")
    expected, whole = unbroken
    output, kills, rounds = tmp_path / "0/runs", 0, 0
    while kills < times:
        output.parent.mkdir(exist_ok=True)
        code = kill_after(command, output, chance.uniform(0.4, 0.8) * whole, number)
        if code == 0:  # it was done before the signal came: begin another
            assert (output / "r/adapter/adapter.lora.h5").read_bytes() == expected
            rounds += 1
            output = tmp_path / f"{rounds}/runs"
            continue
        kills += 1
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 75)
        assert not (output / "r/stages/train.json").exists()
    done = job(*command, str(output))
    assert done.code == 0, done.err
    assert (output / "r/adapter/adapter.lora.h5").read_bytes() == expected
