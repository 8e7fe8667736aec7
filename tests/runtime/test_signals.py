"""A stop is handled at any time: while Python starts, in an import, in endless work."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command import COMMAND

BLOCKED = ("env", "--block-signal=TERM,INT")
"""Starts the job as the container's entrypoint does."""
LONG = 600
"""Seconds that no test waits for."""


def run_program(program: str, *signals: signal.Signals) -> tuple[int, str]:
    """Run a program that prints a line when it is ready, and send it signals a moment apart.

    Returns its exit code and its stderr; it must end before `LONG` seconds.
    """
    # A shell may have started these tests with Ctrl-C ignored.
    command = ["env", "--default-signal=INT", sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.2)
        _, err = process.communicate(timeout=60)
    return process.returncode, err


PROGRAM = """
import sys, time
from job.errors import RunStoppedError
from job.runtime import signals
signals.GRACE_SECONDS = {grace}
signals.STOP.install()
def ready():
    print("ready", flush=True)
def loop():
    ready()
    try:
        while True:
            signals.STOP.check()
            time.sleep(0.05)
    except RunStoppedError as stopped:
        sys.exit(f"saved: {{stopped}}")
{work}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_outside_of_a_run_is_immediate(number: signal.Signals) -> None:
    program = PROGRAM.format(grace=LONG, work="ready(); time.sleep(600)")
    code, err = run_program(program, number)
    assert (code, err) == (
        75,
        f"error: stopped by {number.name}; run the same command to resume\n",
    )


def test_work_that_checks_for_a_stop_can_save() -> None:
    program = PROGRAM.format(grace=LONG, work="with signals.STOP.graceful(): loop()")
    code, err = run_program(program, signal.SIGTERM)
    assert code == 1
    assert err.startswith("saved: stopped by SIGTERM")


def test_work_that_never_checks_ends_after_the_grace_time() -> None:
    work = "with signals.STOP.graceful():\n ready()\n while True: pass"
    code, err = run_program(PROGRAM.format(grace=1, work=work), signal.SIGTERM)
    assert (code, err.count("\n")) == (75, 1)


def test_ctrl_c_interrupts_an_interactive_session() -> None:
    work = """
try:
    with signals.STOP.interactive():
        ready()
        time.sleep(600)
except KeyboardInterrupt:
    sys.exit(7)
"""
    code, err = run_program(PROGRAM.format(grace=LONG, work=work), signal.SIGINT)
    assert (code, err) == (7, "")


def test_a_second_ctrl_c_does_not_wait() -> None:
    work = "with signals.STOP.graceful(): ready(); time.sleep(600)"
    program = PROGRAM.format(grace=LONG, work=work)
    code, _ = run_program(program, signal.SIGTERM, signal.SIGINT)
    assert code == 75


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
    started = "job started" in out  # if a second is enough for that
    assert started or not (tmp_path / "runs").exists()
