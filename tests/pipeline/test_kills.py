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
    "--output",
)  # fmt: skip


def kill_after(output: Path, seconds: float, number: signal.Signals) -> int:
    """Start the job, send the signal after some time, and return its exit code."""
    with (output.parent / "log").open("ab") as log:
        process = subprocess.Popen([*COMMAND, *SHORT, str(output)], stdout=log, stderr=log)
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
    tmp_path: Path, number: signal.Signals, times: int
) -> None:
    times *= int(os.environ.get("KILL_ROUNDS", "1"))
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    sys.stdout.write(f"seed {seed}\n")
    clock = time.monotonic()
    unbroken = job(*SHORT, str(tmp_path / "whole"))
    whole = time.monotonic() - clock
    assert unbroken.code == 0, unbroken.err
    expected = (tmp_path / "whole/r/adapter/adapter.lora.h5").read_bytes()

    output, kills, rounds = tmp_path / "0/runs", 0, 0
    while kills < times:
        output.parent.mkdir(exist_ok=True)
        code = kill_after(output, chance.uniform(0.2, 0.6) * whole, number)
        if code == 0:  # it was done before the signal came: begin another
            assert (output / "r/adapter/adapter.lora.h5").read_bytes() == expected
            rounds += 1
            output = tmp_path / f"{rounds}/runs"
            continue
        kills += 1
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 75)
        assert not (output / "r/stages/train.json").exists()
    done = job(*SHORT, str(output))
    assert done.code == 0, done.err
    assert (output / "r/adapter/adapter.lora.h5").read_bytes() == expected
