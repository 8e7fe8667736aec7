"""Preflight: checks before anything is started, and the stage that pins what the run reads."""

import json
import re
from pathlib import Path

from job.chat.text_tokenizer import read_json
from job.errors import SetupError, UsageError
from job.model.smollm2 import smollm2_preset
from job.pipeline.layout import RESULTS, SPEC
from job.pipeline.run import Preflight, Run, StageRecord, now
from job.pipeline.stages import stage_digests
from job.pipeline.status import earlier_preflight
from job.runtime import logs
from job.spec.evals import HarnessEval
from job.spec.fields import SAMPLES, SMOLLM2, is_template_file
from job.spec.load import digest, run_id, spec_text
from job.spec.pinning import resolve_all
from job.spec.schema import Spec


def check_run_id(given: str | None, spec: Spec) -> str:
    """Return the run id: the given one, or the spec's own.

    Raises:
        UsageError: it cannot name a folder and an object everywhere.
    """
    identity = given if given is not None else run_id(spec)
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?", identity):
        raise UsageError(
            f"--run-id {identity!r}: use up to 128 letters, digits, '.', '_' and '-', "
            "with a letter or digit first and last"
        )
    return identity


def check_local_inputs(spec: Spec) -> None:
    """Check that local input files exist, before anything is started or written.

    Raises:
        UsageError: one does not.
        SetupError: the preset needs packages that are not installed.
    """
    preset = spec.model.preset
    if preset == SMOLLM2:
        smollm2_preset()  # fails before anything is written
    if "/" in preset and "://" not in preset and not Path(preset).is_dir():
        raise UsageError(
            f"model.preset: there is no folder {preset!r}; for a model on the Hub write "
            "hf://owner/name"
        )
    for entry in spec.evals.harness:
        _check_harness(entry)
    template = spec.model.chat_template
    if is_template_file(template) and not Path(template).is_file():
        raise UsageError(f"model.chat_template: there is no file {template!r}")
    for task in spec.evals.tasks:
        if task.function is not None:
            if not Path(task.function[0]).is_file():
                raise UsageError(
                    f"evals.tasks '{task.name}': there is no file {task.function[0]!r}"
                )
            from job.evals.text_metrics import make_metric

            make_metric(task).grade([])
    for where, source in spec.sources.items():
        if source.dataset == SAMPLES or "://" in source.dataset:
            continue
        if source.data_files is not None:
            if not Path(source.dataset).is_dir():
                raise UsageError(f"{where}.dataset: there is no folder {source.dataset!r}")
        elif not Path(source.dataset).exists():
            raise UsageError(
                f"{where}.dataset: there is no file or folder {source.dataset!r}; "
                "for a dataset on the Hub write hf://owner/name"
            )


def _check_harness(entry: HarnessEval) -> None:
    if entry.include is not None and not Path(entry.include).is_dir():
        raise UsageError(f"evals.harness: there is no folder {entry.include!r}")
    try:
        from job.evals.harness import check_task
    except ImportError as error:
        raise SetupError(
            "evals.harness needs the packages of the `harness` extra; run "
            "`uv run --extra harness job run SPEC`"
        ) from error
    check_task(entry)


def check_model_files(spec: Spec) -> None:
    """Check the configuration, tokenizer and chat template of a model on this machine.

    Those of a model on the Hub are checked when its files arrive.

    Raises:
        UsageError: the model would not be what its makers trained, or cannot be prompted.
    """
    from job.model.abstract import make_task
    from job.model.load import load_chat_tokenizer, resolve_preset

    if spec.model.preset.startswith("hf://"):
        return
    preset = resolve_preset(spec.model)
    load_chat_tokenizer(spec.model, preset)
    config = read_json(Path(preset.handle) / "config.json")
    if "model_type" in config:
        make_task(spec.model, config)


def run_preflight(run: Run, *, resumed: bool) -> None:
    """Record the machine and pin the commits to read; runs whenever another stage does.

    Args:
        run: the run.
        resumed: whether an unfinished run is started again.

    Raises:
        SetupError: this process does not see what the primary one writes.
    """
    record = StageRecord.model_validate_json(
        run.processes.broadcast(lambda: _record_preflight(run, resumed=resumed).model_dump_json())
    )
    run.records["preflight"] = record
    run.revisions = Preflight.model_validate(record.outcome).revisions
    digests = run.processes.broadcast(lambda: json.dumps(stage_digests(run.spec, run.revisions)))
    run.digests |= json.loads(digests)
    if run.store.stat(SPEC) is None:
        raise SetupError(
            f"process {run.processes.index} does not see what process 0 wrote to {run.store.uri}: "
            "`output` must be a bucket, or a folder that all machines share"
        )


def _record_preflight(run: Run, *, resumed: bool) -> StageRecord:
    started = now()
    earlier = earlier_preflight(run.records)
    run.revisions = resolve_all(run.spec, earlier.revisions)
    outcome = Preflight(
        first_started=earlier.first_started,
        resumes=earlier.resumes + resumed,
        revisions=dict(run.revisions),
    )
    run.store.delete(RESULTS)
    run.outputs = []
    header = "# The spec as it was run, with overrides and defaults.\n"
    run.put(SPEC, f"{header}{spec_text(run.spec)}".encode())
    run.digests["preflight"] = digest([run.environment.model_dump(mode="json"), run.revisions])
    record = run.record_stage("preflight", started, 0.0, outcome)
    logs.get().info(
        "environment check passed",
        platform=run.environment.platform,
        devices=run.environment.devices,
        kind=run.environment.device_kind,
        packages=run.environment.packages,
        **({"revisions": dict(run.revisions)} if run.revisions else {}),
    )
    for endpoint in filter(None, (run.spec.reference, run.spec.evals.judge)):
        from job.evals.api_client import missing_key

        if missing := missing_key(endpoint):
            logs.get().warning(missing)
    return record
