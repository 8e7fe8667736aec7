"""The training step is compiled ahead of time, and never delays the end of a job."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from job.pipeline import train_stage
from job.pipeline.run import Run, StageRecord
from job.runtime.signals import StopSignal
from job.storage.local import LocalStore
from tests.data.staged import MACHINE, spec_of

SHORT = ("run", "smoke", "--set", "train.epochs=1", "--set", "evals.dialogue=null")
FORCED = """
from job.runtime.signals import STOP, exit_now
STOP.install()
import time
from job import cli
from job.machine import devices
start = devices.start
devices.start = lambda spec: start(spec).model_copy(update=dict(platform="pretended"))
{more}
exit_now(cli.main())
"""
SLOW_COMPILER = """
from job.train.trainer import Trainer
Trainer.trace_step = lambda self: (lambda: time.sleep(100))
"""


@pytest.mark.parametrize(
    ("pending", "platform", "prepares"),
    [
        (["baseline", "train"], "tpu", True),
        (["baseline"], "tpu", False),
        (["baseline", "train"], "cpu", False),
    ],
    ids=["train is pending", "train is up to date or not requested", "cpu"],
)
@pytest.mark.parametrize("has_record", [True, False])
def test_the_step_is_prepared_only_if_the_run_will_train(
    pending: list[str], platform: str, prepares: bool, has_record: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    machine = MACHINE.model_copy(update={"platform": platform})
    record = StageRecord(
        stage="train", digest="of other inputs", outputs=[], started="", seconds=0,
        environment=machine, outcome={},
    )  # fmt: skip
    run = Run(
        "r", spec_of(str(tmp_path), "samples"), LocalStore(tmp_path), tmp_path, StopSignal(),
        machine, records={"train": record} if has_record else {}, pending=frozenset(pending),
    )  # fmt: skip

    def prepare(_run: Run) -> None:
        raise LookupError

    monkeypatch.setattr(train_stage, "prepare", prepare)
    if prepares:
        with pytest.raises(LookupError):
            train_stage.prepare_in_background(run)
    else:
        train_stage.prepare_in_background(run)
        assert run.prepared_training is None


@pytest.mark.slow
def test_a_run_compiles_the_step_ahead_of_time(tmp_path: Path, two_blocks: str) -> None:
    more = ("--set", f"model.preset={two_blocks}", "--output", str(tmp_path))
    command = [sys.executable, "-c", FORCED.format(more=""), *SHORT, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    compiled = done.stdout.index('"step compiled ahead of time"')
    assert compiled < done.stdout.index('"verdict')
    assert len(list(tmp_path.glob("*/results.json"))) == 1


@pytest.mark.slow
def test_a_stopped_job_does_not_wait_for_the_compiler(tmp_path: Path, two_blocks: str) -> None:
    more = ("--set", f"model.preset={two_blocks}", "--output", str(tmp_path))
    code = FORCED.format(more=SLOW_COMPILER)
    with subprocess.Popen(
        [sys.executable, "-c", code, *SHORT, *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if '"task evaluated"' in line:
                process.send_signal(signal.SIGTERM)
                break
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 75, errors
