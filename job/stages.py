"""The stages of a job: what each is a function of, what it needs, and where its work is.

The digest of a stage covers its inputs and, through the stages it needs, theirs: a marker
with the same digest was made from the same things.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from job.run import Marker, Run
from job.spec import SAMPLES, Source, Spec
from job.spec_loading import digest
from job.storage import file_sha256


@dataclass(frozen=True)
class Stage:
    """One stage: what it is a function of, and the function."""

    name: str
    needs: tuple[str, ...]
    inputs: Callable[[Spec], object]
    """The parts of the spec (and of local input files) that it is a function of."""
    run: Callable[[Run], BaseModel]
    unfinished: Callable[[Marker, Spec], bool] = lambda _marker, _spec: False
    """Whether a finished stage could do more now than it could then."""


def _source(source: Source) -> object:
    """A source of rows, with the content of a local file: it may change under the same name."""
    described = source.model_dump(mode="json")
    path = Path(source.dataset)
    if source.dataset != SAMPLES and not source.dataset.startswith("hf://") and path.is_file():
        described["sha256"] = file_sha256(path)
    return described


_SMALL = 1_000_000


def _base_model(spec: Spec) -> object:
    """The model without the adapter. Of a local preset's large files the size must do."""
    described = spec.model.model_dump(mode="json", exclude={"lora"})
    folder = Path(spec.model.preset)
    if spec.model.preset != "tiny" and folder.is_dir():
        described["files"] = {
            path.relative_to(folder).as_posix(): file_sha256(path)
            if path.stat().st_size <= _SMALL
            else path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    return described


def _evals(spec: Spec) -> object:
    slices = [_source(item) for item in spec.evals.multiple_choice]
    return [spec.seed, _base_model(spec), spec.evals.model_dump(mode="json"), slices]


def _training(spec: Spec) -> object:
    lora = spec.model.lora.model_dump(mode="json")
    return [spec.seed, _base_model(spec), lora, spec.train.model_dump(mode="json")]


def _reference(spec: Spec) -> object:
    asked = None if spec.reference is None else spec.reference.model_dump(mode="json")
    evals = spec.evals.model_dump(mode="json", exclude={"dialogue", "batch_size"})
    return [asked, evals, [_source(item) for item in spec.evals.multiple_choice]]


def _run_data(run: Run) -> BaseModel:
    from job.data.stage import run_stage

    return run_stage(run)


def _run_baseline(run: Run) -> BaseModel:
    from job.evals.stage import run_stage

    return run_stage(run, "baseline")


def _run_train(run: Run) -> BaseModel:
    from job.train.stage import run_stage

    return run_stage(run)


def _run_finetuned(run: Run) -> BaseModel:
    from job.evals.stage import run_stage

    return run_stage(run, "finetuned")


def _run_reference(run: Run) -> BaseModel:
    from job.evals.reference import run_stage

    return run_stage(run)


def _run_report(run: Run) -> BaseModel:
    from job.report.stage import run_stage

    return run_stage(run)


def _reference_unfinished(marker: Marker, spec: Spec) -> bool:
    from job.evals.reference_key import could_do_more

    return could_do_more(marker.outcome, spec.reference)


STAGES = (
    Stage("data", (), lambda spec: [spec.seed, _source(spec.data)], _run_data),
    Stage("baseline", ("data",), _evals, _run_baseline),
    Stage("train", ("data",), _training, _run_train),
    Stage("finetuned", ("data", "train"), _evals, _run_finetuned),
    Stage("reference", ("data",), _reference, _run_reference, _reference_unfinished),
    Stage(
        "report",
        ("data", "baseline", "train", "finetuned", "reference"),
        lambda spec: spec.model_dump(mode="json", exclude={"output"}),
        _run_report,
    ),
)
NAMES = ("preflight", *(stage.name for stage in STAGES))


def stage_digests(spec: Spec, stages: Sequence[Stage] = STAGES) -> dict[str, str]:
    """The digest of every stage's inputs: its own, and through those it needs, theirs."""
    digests: dict[str, str] = {}
    for stage in stages:
        needed = {name: digests[name] for name in stage.needs}
        digests[stage.name] = digest([stage.name, stage.inputs(spec), needed])
    return digests


def dependents(name: str, stages: Sequence[Stage] = STAGES) -> list[str]:
    """Names of the stages that need `name`, directly or not."""
    found = [name]
    for stage in stages:
        if any(need in found for need in stage.needs):
            found.append(stage.name)
    return found[1:]
