"""The stages of a run: what each depends on, and what runs it.

The digest of a stage covers its own inputs and, through the stages it needs, theirs: two records
with the same digest were made from the same inputs.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from job.chat.templates import BUILT_IN, built_in
from job.evals.predictions import LOSS
from job.evals.tasks import few_shot_source
from job.pipeline.layout import ADAPTER
from job.pipeline.run import Run, StageRecord
from job.spec.evals import HELD_OUT, TextEval
from job.spec.fields import BUILT_PRESETS, SAMPLES, is_template_file
from job.spec.load import digest
from job.spec.pinning import NONE, Revisions, hub_key
from job.spec.remote import Endpoint
from job.spec.schema import MultipleChoiceEval, Source, Spec
from job.storage.base import file_sha256

_PARSING_VERSION = 3
"""Increment it when the same answer of a model is read differently."""

_UNUSED_OF_ENDPOINTS = {"timeout_seconds", "attempts", "concurrency", "max_usd"}
"""Keys that change no answer of a remote model."""

_SMALL_FILE = 1_000_000
"""Bytes up to which a file of a local model is hashed; of larger ones size and time count."""


@dataclass(frozen=True)
class Stage:
    """One stage: its inputs, the stages it needs, and the function that runs it."""

    name: str
    needs: tuple[str, ...]
    inputs: Callable[[Spec, Revisions], object]
    """Parts of the spec, and identities of input files, that the outputs depend on."""
    run: Callable[[Run], BaseModel]
    has_more_to_do: Callable[[StageRecord, Spec], bool] = lambda _record, _spec: False
    """Whether a finished stage has work left that has become possible."""
    on_all_processes: bool = False
    """Whether the stage uses the devices; other stages run on the primary process."""


def _run_in(module: str, *arguments: str) -> Callable[[Run], BaseModel]:
    """Return the `run_stage` of a module, which is imported when it runs: it may import JAX."""

    def run_stage(run: Run) -> BaseModel:
        stage = importlib.import_module(f"job.pipeline.{module}")
        outcome: BaseModel = stage.run_stage(run, *arguments)
        return outcome

    return run_stage


def has_more_to_do(outcome: Mapping[str, object], endpoint: Endpoint | None) -> bool:
    """Return whether a stage that left requests open could have them answered now."""
    from job.evals.api_client import missing_key

    if endpoint is None or missing_key(endpoint) is not None:
        return False
    stopped_at = outcome.get("stopped_at_usd")
    if isinstance(stopped_at, float) and (endpoint.max_usd or math.inf) <= stopped_at:
        return False
    return outcome.get("open") is True


def _data_inputs(spec: Spec, revisions: Revisions) -> object:
    inputs = [spec.seed, spec.data.model_dump(mode="json"), _source(spec.data, revisions)]
    if spec.data.messages:  # which of them can be rendered depends on the chat template
        inputs.append(_base_model(spec, revisions))
    if "contaminated" in spec.data.checks.drop:  # then the sample depends on the questions
        inputs.append(_tasks(spec.evals.multiple_choice, revisions))
    return inputs


def _eval_inputs(spec: Spec, revisions: Revisions) -> object:
    # The batch size, limits, and what is computed from the answers later, change no prediction.
    unused = {"multiple_choice", "tasks", "batch_size", "bootstrap_samples"}
    unused |= {"max_truncated_share", "judge"}
    exclude: Any = dict.fromkeys(unused, True) | {"dialogue": {"markers"}}
    exclude["harness"] = {"__all__": {"role", "margin"}}
    evals = spec.evals.model_dump(mode="json", exclude=exclude)
    folders = [Path(entry.include) for entry in spec.evals.harness if entry.include]
    files = [[_content(p) for p in sorted(f.rglob("*")) if p.is_file()] for f in folders]
    tasks = _tasks(spec.evals.multiple_choice, revisions)
    text = _text_tasks(spec.evals.tasks, revisions)
    inputs = [spec.seed, _base_model(spec, revisions), evals, tasks, files, _PARSING_VERSION, LOSS]
    return [*inputs, *text]


def _train_inputs(spec: Spec, revisions: Revisions) -> object:
    lora = spec.model.lora.model_dump(mode="json")
    train = spec.train.model_dump(mode="json")
    adapter = _init_adapter(spec, revisions)
    return [spec.seed, _base_model(spec, revisions), lora, train, adapter]


def _reference_inputs(spec: Spec, revisions: Revisions) -> object:
    if spec.reference is None:
        return None
    reference = spec.reference.model_dump(mode="json", exclude=_UNUSED_OF_ENDPOINTS)
    side_by_side = spec.evals.side_by_side.model_dump(mode="json", include={"examples", "prompts"})
    dialogue = None
    if spec.reference.dialogue and spec.evals.dialogue is not None:
        dialogue = spec.evals.dialogue.model_dump(
            mode="json", include={"examples", "max_new_tokens"}
        )
    tasks = _tasks(spec.reference_tasks, revisions)
    text = _text_tasks(spec.reference_text_tasks, revisions)
    return [reference, side_by_side, dialogue, tasks, _PARSING_VERSION, *text]


def _judge_inputs(spec: Spec, _revisions: Revisions) -> object:
    if spec.evals.judge is None:
        return None
    return spec.evals.judge.model_dump(mode="json", exclude=_UNUSED_OF_ENDPOINTS)


STAGES = (
    Stage("data", (), _data_inputs, _run_in("data_stage")),
    Stage(
        "baseline",
        ("data",),
        _eval_inputs,
        _run_in("eval_stage", "baseline"),
        on_all_processes=True,
    ),
    Stage("train", ("data",), _train_inputs, _run_in("train_stage"), on_all_processes=True),
    Stage(
        "finetuned",
        ("data", "train"),
        _eval_inputs,
        _run_in("eval_stage", "finetuned"),
        on_all_processes=True,
    ),
    Stage(
        "reference",
        ("data",),
        _reference_inputs,
        _run_in("reference_stage"),
        lambda record, spec: has_more_to_do(record.outcome, spec.reference),
    ),
    Stage(
        "judge",
        ("data", "baseline", "finetuned"),
        _judge_inputs,
        _run_in("judge_stage"),
        lambda record, spec: has_more_to_do(record.outcome, spec.evals.judge),
    ),
    Stage(
        "report",
        ("data", "baseline", "train", "finetuned", "reference", "judge"),
        lambda spec, _revisions: spec.model_dump(mode="json", exclude={"output"}),
        _run_in("report_stage"),
    ),
)
NAMES = ("preflight", *(stage.name for stage in STAGES))


def stage_digests(spec: Spec, revisions: Revisions = NONE) -> dict[str, str]:
    """Return the digest of every stage's inputs, including those of the stages it needs."""
    digests: dict[str, str] = {}
    for stage in STAGES:
        needed = {name: digests[name] for name in stage.needs}
        digests[stage.name] = digest([stage.name, stage.inputs(spec, revisions), needed])
    return digests


def dependents(name: str) -> list[str]:
    """Return the names of the stages that need `name`, directly or not."""
    names = [name]
    for stage in STAGES:
        if any(need in names for need in stage.needs):
            names.append(stage.name)
    return names[1:]


def _source(source: Source, revisions: Revisions) -> object:
    """Identify a source of rows: by its commit, or by the content of its files."""
    identity = source.model_dump(mode="json", include=set(Source.model_fields))
    if key := hub_key("dataset", source.dataset, source.revision):
        identity["commit"] = revisions.get(key)
    elif source.dataset != SAMPLES and not source.dataset.startswith("hf://"):
        from job.data.sources import open_source

        identity["files"] = [file.identity for file in open_source(source, "dialogues").files]
    return identity


def _tasks(entries: Sequence[MultipleChoiceEval], revisions: Revisions) -> object:
    return [
        [
            entry.model_dump(mode="json", exclude={"role", "margin"}),
            *(_source(source, revisions) for source in (entry, few_shot_source(entry)) if source),
        ]
        for entry in entries
    ]


def _text_tasks(entries: Sequence[TextEval], revisions: Revisions) -> list[object]:
    identities: list[object] = []
    for entry in entries:
        identities.append(entry.model_dump(mode="json", exclude={"role", "margin"}))
        if entry.dataset != HELD_OUT:
            identities.append(_source(entry, revisions))
        if entry.function is not None:
            folder = Path(entry.function[0]).parent  # it may import what is beside it
            identities.append({path.name: _content(path) for path in sorted(folder.glob("*.py"))})
    return identities


def _base_model(spec: Spec, revisions: Revisions) -> object:
    """Identify the model without its adapter: by its commit, or by its files."""
    identity = spec.model.model_dump(mode="json", exclude={"lora"})
    identity["template"] = _chat_template(spec.model.chat_template)
    folder = Path(spec.model.preset)
    if key := hub_key("model", spec.model.preset, spec.model.revision):
        identity["commit"] = revisions.get(key)
    elif spec.model.preset not in BUILT_PRESETS and folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        identity["files"] = {path.relative_to(folder).as_posix(): _content(path) for path in files}
    return identity


def _chat_template(name: str) -> str | None:
    """Identify a chat template that is not of the model: a file, or the built-in ones."""
    if is_template_file(name):
        return file_sha256(Path(name)) if Path(name).is_file() else None
    return digest([built_in(each).text for each in BUILT_IN])


def _content(path: Path) -> object:
    status = path.stat()
    if status.st_size <= _SMALL_FILE:
        return file_sha256(path)
    return [status.st_size, status.st_mtime_ns]


def _init_adapter(spec: Spec, revisions: Revisions) -> object:
    """Identify the adapter that training starts from: by its commit, or by its files."""
    if spec.train.init_adapter is None:
        return None
    if key := hub_key("model", spec.train.init_adapter):
        return revisions.get(key)
    from job.adapters.locate import find_adapter

    return find_adapter(spec.train.init_adapter, "train.init_adapter", ADAPTER).digests()
