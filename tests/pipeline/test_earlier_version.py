"""A run of version 0.1 is fetched and compared as it is, and goes on where it was interrupted.

`run_0_1.tar.xz` is `job run smoke` of that version on fewer examples, with its staged dataset and
without TensorBoard events.
"""

import tarfile
from pathlib import Path

import pytest

from job.commands.compare import read_finished
from job.commands.fetch import fetch_run
from job.results import Results
from tests.command import job

FIXTURE = Path(__file__).with_name("run_0_1.tar.xz")


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "old"


def test_a_run_of_0_1_is_fetched_and_compared(earlier: Path, tmp_path: Path) -> None:
    fetch_run(str(earlier), str(tmp_path / "copy"))
    results = Results.model_validate_json((tmp_path / "copy/results.json").read_bytes())
    assert results.model.lora_rank == 1
    read_finished(str(earlier))


@pytest.mark.slow
def test_an_interrupted_run_of_0_1_is_finished(earlier: Path) -> None:
    for name in ("train", "finetuned", "reference", "report"):
        (earlier / f"stages/{name}.json").unlink()
    (earlier / "results.json").unlink()
    done = job(
        "run", str(earlier / "spec.yaml"), "--output", str(earlier.parent), "--run-id", "old"
    )
    assert done.code == 0, done.err
    results = Results.model_validate_json((earlier / "results.json").read_bytes())
    assert results.run.resumes == 1
