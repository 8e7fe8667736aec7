"""The training step compiled ahead: found by training, never in the way of an end."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from job.model.language_model import LanguageModel
from job.pipeline import background_compile
from job.pipeline.background_compile import Ahead, compile_ahead
from job.pipeline.train_stage import Prepared
from job.train.loss import LossSums
from tests.train.test_trainer import trainer

FORCED = """
from job.stopping import STOP
STOP.install()
import sys, time
import job.train.ahead as ahead
from job.cli import main
ahead.compile_ahead = ahead.begin_ahead
{more}
main()
"""
SLOW_COMPILER = """
from job.train.loop import Trainer
Trainer.trace_first = lambda self: (lambda: time.sleep(100))
"""


def test_training_finds_the_step_that_was_compiled_ahead(
    tmp_path: Path, tiny: LanguageModel
) -> None:
    made, _ = trainer(tmp_path, tiny, batch_size=6, epochs=1, compile="step")
    spent: list[float] = []

    def on_event(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            spent.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(on_event)
    began = Ahead(Prepared(tiny, None, 1.0, made), made.trace_first())  # type: ignore[arg-type]
    assert began.take().trainer is made
    assert not background_compile.is_compiling()
    before = max(spent)
    spent.clear()
    made._validate_rows = lambda *_: LossSums(jax.numpy.ones(()), jax.numpy.ones(()))
    made.run()
    assert max(spent, default=0.0) < before / 2


@pytest.mark.parametrize(
    ("platform", "trained", "begun"),
    [("tpu", False, True), ("gpu", False, True), ("cpu", False, False), ("tpu", True, False)],
)
def test_it_begins_where_there_is_an_accelerator_and_something_to_train(
    platform: str, trained: bool, begun: bool, tmp_path: Path, tiny: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    _, run = trainer(tmp_path, tiny)
    run.environment = run.environment.model_copy(update={"platform": platform})
    if trained:
        run.markers["train"] = None  # type: ignore[assignment]
    seen = []
    monkeypatch.setattr(background_compile, "begin_ahead", seen.append)
    compile_ahead(run)
    assert seen == ([run] if begun else [])


@pytest.mark.slow
def test_a_whole_run_compiles_ahead_and_ends_as_ever(tmp_path: Path) -> None:
    output = f"output={str(tmp_path)!r}"
    command = [sys.executable, "-c", FORCED.format(more=""), "run", "smoke", "--set", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index('"the training step is compiled"') < done.stdout.index('"verdict')
    assert (tmp_path / next(tmp_path.iterdir()).name / "results.json").is_file()


@pytest.mark.slow
def test_a_job_that_is_stopped_does_not_wait_for_the_compiler(tmp_path: Path) -> None:
    output = f"output={str(tmp_path)!r}"
    code = FORCED.format(more=SLOW_COMPILER)
    with subprocess.Popen(
        [sys.executable, "-c", code, "run", "smoke", "--set", output],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if '"answered"' in line:
                process.send_signal(signal.SIGTERM)
                break
        begin = time.monotonic()
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert time.monotonic() - begin < 90
