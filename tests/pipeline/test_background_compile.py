"""The training step is compiled ahead of time, and never delays the end of a job."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

FORCED = """
from job.runtime.signals import STOP
STOP.install()
import sys, time
from job.results import EnvironmentInfo
from job.machine import devices
start = devices.start
devices.start = lambda spec: start(spec).model_copy(update={"platform": "pretended"})
from job.cli import main
{more}
main()
"""
SLOW_COMPILER = """
from job.train.trainer import Trainer
Trainer.trace_step = lambda self: (lambda: time.sleep(100))
"""


@pytest.mark.slow
def test_a_run_compiles_the_step_ahead_of_time(tmp_path: Path) -> None:
    output = f"output={str(tmp_path)!r}"
    command = [sys.executable, "-c", FORCED.format(more=""), "run", "smoke", "--set", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    compiled = done.stdout.index('"step compiled ahead of time"')
    assert compiled < done.stdout.index('"verdict')
    assert (tmp_path / next(tmp_path.iterdir()).name / "results.json").is_file()


@pytest.mark.slow
def test_a_stopped_job_does_not_wait_for_the_compiler(tmp_path: Path) -> None:
    output = f"output={str(tmp_path)!r}"
    code = FORCED.format(more=SLOW_COMPILER)
    with subprocess.Popen(
        [sys.executable, "-c", code, "run", "smoke", "--set", output],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if '"task evaluated"' in line:
                process.send_signal(signal.SIGTERM)
                break
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 75, errors
