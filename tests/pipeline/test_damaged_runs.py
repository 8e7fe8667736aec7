"""A damaged file of a run is an error in plain words, or changes nothing that is read from it.

`FUZZ_CASES` sets how many damages are tried; the seed of each is in its message.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from job.commands.compare import read_finished
from job.commands.fetch import fetch_run
from job.commands.trained_run import TrainedRun
from job.errors import JobError, UsageError
from job.pipeline.report_stage import run_stage as run_report
from job.pipeline.run import Run
from job.pipeline.stages import NAMES
from job.pipeline.status import read_run_status, read_stage_records
from job.runtime.signals import StopSignal
from job.spec.load import parse_spec
from job.storage.local import LocalStore
from tests.command import job
from tests.damage import damage
from tests.data.staged import MACHINE

pytestmark = pytest.mark.slow
CASES = int(os.environ.get("FUZZ_CASES", "100"))
UNCHECKED = ("results.json", "logs/job.jsonl", "spec.yaml")
"""Files whose content nothing vouches for: every reader must survive them."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, two_blocks: str) -> Path:
    output = tmp_path_factory.mktemp("runs")
    done = job(
        "run", "smoke", "--output", str(output), "--set", f"model.preset={two_blocks}",
        "--set", "train.epochs=1", "--set", "evals.dialogue.examples=6",
        "--set", "evals.dialogue.max_new_tokens=4", "--set", "evals.side_by_side.examples=4",
        "--set", "evals.side_by_side.max_new_tokens=4",
    )  # fmt: skip
    assert done.code == 0, done.err
    (run,) = (path for path in output.iterdir() if path.name != "datasets")
    return run


def fetched(run: Path, work: Path) -> object:
    fetch_run(str(run), str(work / "fetched"))
    store = LocalStore(work / "fetched")
    return {key: store.read(key) for key in store.list() if key not in UNCHECKED}


def compared(run: Path, work: Path) -> object:
    run_read = read_finished(str(run))
    return run_read.lines


def used(run: Path, work: Path) -> object:
    trained = TrainedRun(str(run), work, "RUN")
    trained.model()
    folder = trained.peft()
    paths = (trained.file("adapter.lora.h5"), *sorted(folder.iterdir()))
    return [path.read_bytes() for path in paths]


def reported(run: Path, work: Path) -> object:
    """Make the report again, as after a change of what only the report reads."""
    store = LocalStore(run)
    text = store.read("spec.yaml")
    if text is None:
        raise UsageError("there is no spec")
    spec = parse_spec(text.decode("utf-8", "replace"), "spec.yaml")
    read_run_status(spec, store)
    records = {k: v for k, v in read_stage_records(store).items() if k != "report"}
    return run_report(
        Run("r", spec, store, work, StopSignal(), MACHINE, records=records)
    ).evaluation.model_dump(mode="json")


READERS = (fetched, compared, used, reported)


def outcome(reader: Callable[[Path, Path], object], run: Path) -> object:
    """Return what a reader makes of a copy of a run, or None if it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(run, Path(folder, "run"))
        Path(folder, "work").mkdir()
        try:
            return reader(Path(folder, "run"), Path(folder, "work"))
        except JobError as error:
            assert "pydantic" not in str(error)
            return None


def test_a_damaged_file_is_refused_or_changes_nothing(finished: Path, tmp_path: Path) -> None:
    expected = [outcome(reader, finished) for reader in READERS]
    assert None not in expected
    files = sorted(p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file())
    assert {f"stages/{name}.json" for name in NAMES} < set(files)
    refused, wrong = 0, []
    for seed in range(CASES):
        chance = random.Random(seed)
        name = files[seed % len(files)]
        kind, damaged = damage((finished / name).read_bytes(), chance)
        copy = tmp_path / "copy"
        shutil.copytree(finished, copy)
        if damaged is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(damaged)
        for reader, right in zip(READERS, expected, strict=True):
            where = f"seed {seed}: {name} {kind}, {reader.__name__}"
            try:
                got = outcome(reader, copy)
            except Exception as error:
                wrong.append(f"{where}: {error!r:.300}")
                continue
            refused += got is None
            if got not in (None, right) and name not in UNCHECKED:
                wrong.append(f"{where}: another result")
        shutil.rmtree(copy)
    assert not wrong, "\n".join(wrong)
    assert refused > CASES / 2
