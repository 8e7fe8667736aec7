"""What a spec must not name when it goes to another machine, and the spec as it is sent there."""

from pathlib import Path

import pytest

from job.errors import SpecError, UsageError
from job.spec.load import check_portable, load_spec, run_id, write_spec


def test_a_shipped_spec_with_a_bucket_is_portable() -> None:
    for name in ("smoke", "chatdoctor-gemma3-1b"):
        check_portable(load_spec(name, ["output=gs://bucket/runs"]))


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("output=./runs", "output"),
        ("data.dataset=rows.jsonl", "data.dataset"),
        ("data.dataset=/data/rows.csv", "data.dataset"),
        ("evals.multiple_choice.0.dataset=questions.jsonl", "evals.multiple_choice.0.dataset"),
        ("model.preset=./gemma", "model.preset"),
        ("train.init_adapter=runs/earlier", "train.init_adapter"),
        ("evals.harness=[{name: own, task: own, include: ./tasks}]", "evals.harness.0.include"),
    ],
)
def test_local_files_and_folders_are_refused_by_path(override: str, path: str) -> None:
    overrides = ["output=gs://bucket/runs", override]
    with pytest.raises(SpecError) as caught:
        check_portable(load_spec("smoke", overrides))
    assert [problem.path for problem in caught.value.problems] == [path]
    assert "is a local " in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "data.dataset=gs://bucket/rows.jsonl",
        "data.dataset=hf://owner/name",
        "model.preset=hf://owner/name",
        "model.preset=gemma3_1b",
        "train.init_adapter=gs://bucket/run",
    ],
)
def test_remote_files_and_presets_are_portable(override: str) -> None:
    check_portable(load_spec("smoke", ["output=gs://bucket/runs", override]))


def test_a_written_spec_is_the_same_run(tmp_path: Path) -> None:
    loaded = load_spec("smoke", ["train.learning_rate=3e-5", "data.prompt=Q ä {input}"])
    path = tmp_path / "spec.yaml"
    write_spec(loaded.spec, str(path))
    again = load_spec(str(path))
    assert again.spec == loaded.spec
    assert run_id(again.spec) == run_id(loaded.spec)


def test_a_spec_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        write_spec(load_spec("smoke").spec, str(tmp_path / "none" / "spec.yaml"))
