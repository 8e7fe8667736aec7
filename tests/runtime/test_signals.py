"""A stop is heard at any time: before Python is up, in an import, in work that goes on for ever."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command import COMMAND

BLOCKED = ("env", "--block-signal=TERM,INT")
"""As the container's entrypoint starts the job."""


def run_program(program: str, *signals: signal.Signals) -> tuple[int, str, float]:
    """Run a program that prints a line when it is ready, and send it signals a moment apart.

    Returns:
        Its exit code, what it wrote to stderr, and the seconds from the first signal to its end.
    """
    # A shell may have begun these tests with Ctrl-C ignored.
    command = ["env", "--default-signal=INT", sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        sent = time.monotonic()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.2)
        _, err = process.communicate(timeout=30)
    return process.returncode, err, time.monotonic() - sent


PROGRAM = """
import sys, time
from job import stopping
from job.errors import Interrupted
stopping.GRACE_SECONDS = {grace}
stopping.STOP.install()
def ready():
    print("ready", flush=True)
def loop():
    ready()
    try:
        while True:
            stopping.STOP.check()
            time.sleep(0.05)
    except Interrupted as stopped:
        sys.exit(f"kept what there was: {{stopped}}")
{work}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_where_there_is_nothing_to_keep_a_stop_ends_the_job_at_once(number: signal.Signals) -> None:
    program = PROGRAM.format(grace=20, work="ready(); time.sleep(20)")
    code, err, seconds = run_program(program, number)
    assert (code, err) == (
        75,
        f"error: stopped by {number.name}; run the same command to resume\n",
    )
    assert seconds < 5


def test_work_that_comes_round_ends_in_good_order() -> None:
    program = PROGRAM.format(grace=20, work="with stopping.STOP.in_good_order(): loop()")
    code, err, seconds = run_program(program, signal.SIGTERM)
    assert code == 1
    assert err.startswith("kept what there was: stopped by SIGTERM")
    assert seconds < 5


def test_work_that_does_not_come_round_is_ended_after_the_time_of_grace() -> None:
    work = "with stopping.STOP.in_good_order():\n ready()\n while True: pass"
    code, err, seconds = run_program(PROGRAM.format(grace=1, work=work), signal.SIGTERM)
    assert (code, err.count("\n")) == (75, 1)
    assert 0.9 < seconds < 10


def test_ctrl_c_ends_a_conversation_quietly() -> None:
    work = """
try:
    with stopping.STOP.conversing():
        ready()
        time.sleep(20)
except KeyboardInterrupt:
    sys.exit(7)
"""
    code, err, seconds = run_program(PROGRAM.format(grace=20, work=work), signal.SIGINT)
    assert (code, err) == (7, "")
    assert seconds < 5


def test_a_second_ctrl_c_does_not_wait() -> None:
    work = "with stopping.STOP.in_good_order(): ready(); time.sleep(20)"
    program = PROGRAM.format(grace=20, work=work)
    code, _, seconds = run_program(program, signal.SIGTERM, signal.SIGINT)
    assert code == 75
    assert seconds < 5


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.1, 0.3, 1.0])
def test_a_stop_while_the_command_starts_is_not_lost(seconds: float, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*BLOCKED, *COMMAND, "run", "smoke", "--output", str(tmp_path / "runs")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    command = Path(f"/proc/{process.pid}/cmdline")
    while not command.read_bytes().startswith(sys.executable.encode()):
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75, out + err
    assert "stopped by SIGTERM; run the same command to resume" in err
    begun = "job started" in out  # where a second is enough for that
    assert begun or not (tmp_path / "runs").exists()
