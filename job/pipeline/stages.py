"""The stages of a job: what each is a function of, what it needs, and where its work is.

The digest of a stage covers its inputs and, through the stages it needs, theirs: a marker
with the same digest was made from the same things.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from job.evals.tasks import shots_source
from job.pipeline.run import RESULTS, Run, StageRecord, now
from job.results import Results
from job.spec.fields import SAMPLES
from job.spec.load import digest
from job.spec.pinning import NONE, Revisions, adapter_key, model_key, source_key
from job.spec.schema import MultipleChoiceEval, Reference, Source, Spec
from job.storage.base import Store, file_sha256


def read_stage_records(store: Store) -> dict[str, StageRecord]:
    """The markers of a run; an unreadable one counts as absent."""
    markers = {}
    for name in NAMES:
        content = store.read(f"stages/{name}.json")
        if content is not None:
            try:
                markers[name] = StageRecord.model_validate_json(content)
            except ValidationError:
                continue
    return markers


def write_results(run: Run) -> None:
    """The last file of a run: what the report stage found, and every file with its checksum."""
    results = run.outcome("report", Results)
    artifacts = [item for name in NAMES for item in run.records[name].outputs]
    seconds = results.run.stage_seconds | {"report": run.records["report"].seconds}
    info = results.run.model_copy(
        update={
            "finished": now(),
            "stage_seconds": seconds,
            "seconds": round(sum(seconds.values()), 3),
        }
    )
    whole = results.model_copy(update={"artifacts": artifacts, "run": info})
    run.commit(RESULTS, whole.model_dump_json(indent=2).encode())


def could_do_more(outcome: Mapping[str, object], reference: Reference | None) -> bool:
    """Whether a stage that left questions open could have them answered now."""
    from job.evals.api_client import missing_key

    if reference is None or missing_key(reference) is not None:
        return False
    stopped_at = outcome.get("stopped_at_usd")
    if isinstance(stopped_at, float) and (reference.max_usd or math.inf) <= stopped_at:
        return False
    return outcome.get("open") is True


@dataclass(frozen=True)
class Stage:
    """One stage: what it is a function of, and the function."""

    name: str
    needs: tuple[str, ...]
    inputs: Callable[[Spec, Revisions], object]
    """The parts of the spec (and of local input files) that it is a function of."""
    run: Callable[[Run], BaseModel]
    unfinished: Callable[[StageRecord, Spec], bool] = lambda _marker, _spec: False
    """Whether a finished stage could do more now than it could then."""
    everywhere: bool = False
    """Whether it uses the devices, and so runs on every process; others run on the first."""


def _source(source: Source, revisions: Revisions) -> object:
    """A source of rows: its commit, or the content of a local file, which may change in place."""
    described = source.model_dump(mode="json", include=set(Source.model_fields))
    if key := source_key(source):
        described["commit"] = revisions.get(key)
    elif source.dataset != SAMPLES and not source.dataset.startswith("hf://"):
        from job.data.sources import open_source

        described["files"] = [file.identity for file in open_source(source, "dialogues").files]
    return described


_SMALL = 1_000_000


def _base_model(spec: Spec, revisions: Revisions) -> object:
    """The model without the adapter: its commit, or what can be told of its files quickly."""
    described = spec.model.model_dump(mode="json", exclude={"lora"})
    folder = Path(spec.model.preset)
    if key := model_key(spec):
        described["commit"] = revisions.get(key)
    elif spec.model.preset != "tiny" and folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        described["files"] = {path.relative_to(folder).as_posix(): _content(path) for path in files}
    return described


def _content(path: Path) -> object:
    status = path.stat()
    return file_sha256(path) if status.st_size <= _SMALL else [status.st_size, status.st_mtime_ns]


def _slices(items: Sequence[MultipleChoiceEval], revisions: Revisions) -> object:
    return [
        [
            item.model_dump(mode="json"),
            *(_source(source, revisions) for source in (item, shots_source(item)) if source),
        ]
        for item in items
    ]


def _data(spec: Spec, revisions: Revisions) -> object:
    described = [spec.seed, spec.data.model_dump(mode="json"), _source(spec.data, revisions)]
    if "contaminated" in spec.data.checks.drop:  # then the sample depends on the questions
        described.append(_slices(spec.evals.multiple_choice, revisions))
    return described


def _evals(spec: Spec, revisions: Revisions) -> object:
    # How many prompts go at once, and what is made of the answers later, change no prediction.
    later = {"multiple_choice": True, "batch_size": True, "bootstrap_samples": True}
    asked = spec.evals.model_dump(mode="json", exclude=later | {"dialogue": {"markers"}})
    slices = _slices(spec.evals.multiple_choice, revisions)
    return [spec.seed, _base_model(spec, revisions), asked, slices]


def _training(spec: Spec, revisions: Revisions) -> object:
    lora = spec.model.lora.model_dump(mode="json")
    train = spec.train.model_dump(mode="json")
    return [spec.seed, _base_model(spec, revisions), lora, train, _initial(spec, revisions)]


def _initial(spec: Spec, revisions: Revisions) -> object:
    """The adapter that training goes on from: its commit, or the content of its files."""
    if spec.train.init_adapter is None:
        return None
    if key := adapter_key(spec):
        return revisions.get(key)
    from job.adapters.locate import find_adapter

    return find_adapter(spec.train.init_adapter, "train.init_adapter").digests()


def _reference(spec: Spec, revisions: Revisions) -> object:
    if spec.reference is None:
        return None
    asked = spec.reference.model_dump(
        mode="json",
        exclude={"timeout_seconds", "attempts", "concurrency", "max_usd"},
    )
    shown = spec.evals.side_by_side.model_dump(mode="json", include={"examples", "prompts"})
    held_out = None
    if spec.reference.dialogue and spec.evals.dialogue is not None:
        held_out = spec.evals.dialogue.model_dump(
            mode="json", include={"examples", "max_new_tokens"}
        )
    return [asked, shown, held_out, _slices(spec.reference_slices, revisions)]


def _run_data(run: Run) -> BaseModel:
    from job.pipeline.data_stage import run_stage

    return run_stage(run)


def _run_baseline(run: Run) -> BaseModel:
    from job.pipeline.eval_stage import run_stage
    from job.pipeline.train_stage import prepare_in_background

    prepare_in_background(run)
    return run_stage(run, "baseline")


def _run_train(run: Run) -> BaseModel:
    from job.pipeline.train_stage import run_stage

    return run_stage(run)


def _run_finetuned(run: Run) -> BaseModel:
    from job.pipeline.eval_stage import run_stage

    return run_stage(run, "finetuned")


def _run_reference(run: Run) -> BaseModel:
    from job.pipeline.reference_stage import run_stage

    return run_stage(run)


def _run_report(run: Run) -> BaseModel:
    from job.pipeline.report_stage import run_stage

    return run_stage(run)


def _reference_unfinished(marker: StageRecord, spec: Spec) -> bool:

    return could_do_more(marker.outcome, spec.reference)


STAGES = (
    Stage("data", (), _data, _run_data),
    Stage("baseline", ("data",), _evals, _run_baseline, everywhere=True),
    Stage("train", ("data",), _training, _run_train, everywhere=True),
    Stage("finetuned", ("data", "train"), _evals, _run_finetuned, everywhere=True),
    Stage("reference", ("data",), _reference, _run_reference, _reference_unfinished),
    Stage(
        "report",
        ("data", "baseline", "train", "finetuned", "reference"),
        lambda spec, _: spec.model_dump(mode="json", exclude={"output"}),
        _run_report,
    ),
)


NAMES = ("preflight", *(stage.name for stage in STAGES))


def stage_digests(
    spec: Spec, revisions: Revisions = NONE, stages: Sequence[Stage] = STAGES
) -> dict[str, str]:
    """The digest of every stage's inputs: its own, and through those it needs, theirs."""
    digests: dict[str, str] = {}
    for stage in stages:
        needed = {name: digests[name] for name in stage.needs}
        digests[stage.name] = digest([stage.name, stage.inputs(spec, revisions), needed])
    return digests


def dependents(name: str, stages: Sequence[Stage] = STAGES) -> list[str]:
    """Names of the stages that need `name`, directly or not."""
    found = [name]
    for stage in stages:
        if any(need in found for need in stage.needs):
            found.append(stage.name)
    return found[1:]
