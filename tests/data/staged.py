"""The data stage in this process, against the stand-in services."""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.data import staging
from job.pipeline.data_stage import run_stage
from job.pipeline.run import Run
from job.results import DataInfo, EnvironmentInfo
from job.runtime import logs
from job.runtime.signals import StopSignal
from job.spec.pinning import resolve_all
from job.spec.schema import Spec
from job.storage.locations import child_uri, open_store

MACHINE = EnvironmentInfo(
    platform="cpu", device_kind="cpu", devices=1, processes=1, python="3.12", packages={},
    git_commit=None, image=None,
)  # fmt: skip


def spec_of(output: str, dataset: str, **data: Any) -> Spec:
    """A spec whose data section holds these."""
    mapping = {} if "messages" in data else {"prompt": "{input}", "response": "{output}"}
    return Spec.model_validate(
        {
            "name": "doctor",
            "output": output,
            "model": {"preset": "tiny"},
            "data": {"dataset": dataset, "validation_examples": 10, **mapping, **data},
        }
    )


def stage(spec: Spec, run_id: str = "r") -> DataInfo:
    """Run the data stage of a spec, as a process of its own would."""
    with tempfile.TemporaryDirectory() as work:
        store = open_store(child_uri(spec.output, run_id))
        revisions = resolve_all(spec, {})
        run = Run(run_id, spec, store, Path(work), StopSignal(), MACHINE, revisions=revisions)
        return run_stage(run)


def left_in(folder: Path) -> Mapping[str, bytes]:
    """Every file of a local output, by path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files_in(folder)}


def files_in(folder: Path) -> list[Path]:
    """The files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """`python -m tests.data.staged SPEC SHARD_ROWS`: a spec as JSON, staged in this process."""
    logs.configure()
    staging.SHARD_ROWS = int(sys.argv[2])
    stage(Spec.model_validate_json(sys.argv[1]))


if __name__ == "__main__":
    main()
