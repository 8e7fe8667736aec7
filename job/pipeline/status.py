"""The state of a run: the records of its stages, and which stages must run again."""

import contextlib
from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from job.pipeline import layout
from job.pipeline.run import Preflight, StageRecord, now, read_results
from job.pipeline.stages import NAMES, STAGES, stage_digests
from job.spec.schema import Spec
from job.storage.base import Store


class RunStatus(BaseModel):
    """State of a run before a command works on it."""

    records: dict[str, StageRecord]
    stale: list[str]
    """Stages that must run, in order."""
    complete: bool
    """Whether results.json exists and is valid."""


def read_run_status(spec: Spec, store: Store, *, fresh: bool = False) -> RunStatus:
    """Read the state of a run.

    Args:
        spec: the spec to compare the records with.
        store: of the run.
        fresh: ignore existing records.
    """
    records = {} if fresh else read_stage_records(store)
    digests = stage_digests(spec, earlier_preflight(records).revisions)
    stale = stale_stages(spec, store, records, digests)
    complete = read_results(store) is not None and _has_outputs(store, records.get("preflight"))
    if not complete and "report" not in stale:
        stale.append("report")
    return RunStatus(records=records, stale=stale, complete=complete)


def read_stage_records(store: Store) -> dict[str, StageRecord]:
    """Return the records of a run by stage; an unreadable record counts as absent."""
    records = {}
    for name in NAMES:
        content = store.read(layout.stage_record(name))
        if content is not None:
            with contextlib.suppress(ValidationError):
                records[name] = StageRecord.model_validate_json(content)
    return records


def stale_stages(
    spec: Spec, store: Store, records: Mapping[str, StageRecord], digests: Mapping[str, str]
) -> list[str]:
    """Return the names of the stages that must run, in order.

    A stage is up to date if its record has the digest of today's inputs, its outputs are there,
    and so are those of the stages it needs.
    """
    stale: list[str] = []
    for stage in STAGES:
        record = records.get(stage.name)
        if (
            record is None
            or record.digest != digests[stage.name]
            or any(need in stale for need in stage.needs)
            or not _has_outputs(store, record)
            or stage.has_more_to_do(record, spec)
        ):
            stale.append(stage.name)
    return stale


def earlier_preflight(records: Mapping[str, StageRecord]) -> Preflight:
    """Return the outcome of the last preflight, or an empty one for a new run."""
    if "preflight" in records:
        with contextlib.suppress(ValidationError):
            return Preflight.model_validate(records["preflight"].outcome)
    return Preflight(first_started=now(), resumes=0, revisions={})


def _has_outputs(store: Store, record: StageRecord | None) -> bool:
    return record is not None and all(
        (stat := store.stat(item.path)) and stat.bytes == item.bytes for item in record.outputs
    )
