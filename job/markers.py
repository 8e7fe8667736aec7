"""What says that something is done: the marker of a stage, and the results of a run."""

from datetime import UTC, datetime

from pydantic import BaseModel, ValidationError

from job.results import Results
from job.run import Marker, Run
from job.stages import NAMES
from job.storage import Store

RESULTS = "results.json"


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def read_markers(store: Store) -> dict[str, Marker]:
    """The markers of a run; an unreadable one counts as absent."""
    markers = {}
    for name in NAMES:
        content = store.read(f"stages/{name}.json")
        if content is not None:
            try:
                markers[name] = Marker.model_validate_json(content)
            except ValidationError:
                continue
    return markers


def read_results(store: Store) -> Results | None:
    """The results of a whole run; unreadable ones count as absent."""
    content = store.read(RESULTS)
    if content is None:
        return None
    try:
        return Results.model_validate_json(content)
    except ValidationError:
        return None


def write_marker(run: Run, name: str, started: str, seconds: float, outcome: BaseModel) -> Marker:
    """Mark a stage as finished, with the files it has written.

    Args:
        started: when, as by `now`.
        seconds: how long it took.
        outcome: what it found out.
    """
    marker = Marker(
        stage=name,
        digest=run.digests[name],
        outputs=run.written,
        started=started,
        seconds=round(seconds, 3),
        environment=run.environment,
        outcome=outcome.model_dump(mode="json"),
    )
    content = marker.model_dump_json(indent=2).encode()
    run.conclude(f"stages/{name}.json", content, again=name == "preflight")
    run.markers[name] = marker
    return marker


def write_results(run: Run) -> None:
    """The last file of a run: what the report stage found, and every file with its checksum."""
    results = run.outcome("report", Results)
    artifacts = [item for name in NAMES for item in run.markers[name].outputs]
    seconds = results.run.stage_seconds | {"report": run.markers["report"].seconds}
    info = results.run.model_copy(
        update={
            "finished": now(),
            "stage_seconds": seconds,
            "seconds": round(sum(seconds.values()), 3),
        }
    )
    whole = results.model_copy(update={"artifacts": artifacts, "run": info})
    run.conclude(RESULTS, whole.model_dump_json(indent=2).encode())
