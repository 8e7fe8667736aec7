"""A spec on its way to another machine: nothing in it may be found on this one only."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from job.errors import Problem, SpecError, UsageError
from job.spec import Spec
from job.spec_loading import LoadedSpec
from job.spec_types import SAMPLES


def check_portable(loaded: LoadedSpec) -> None:
    """Refuse a spec that names files or folders of this machine.

    Raises:
        SpecError: it does; holds every place.
    """
    problems = [Problem(loaded.source, *found) for found in _local_parts(loaded.spec)]
    if problems:
        raise SpecError(problems)


def write_spec(spec: Spec, path: str) -> None:
    """Write the whole spec, with its defaults and all that was set, as YAML.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        Path(path).write_text(spec_text(spec), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def spec_text(spec: Spec) -> str:
    """The whole spec as YAML."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _local_parts(spec: Spec) -> Iterator[tuple[str, str]]:
    """The paths of values that name something of this machine, each with what to do."""
    if not spec.output.startswith("gs://"):
        yield "output", f"{spec.output!r} is a folder of one machine; write gs://bucket/prefix"
    preset = spec.model.preset
    if "://" not in preset and ("/" in preset or Path(preset).is_dir()):
        yield (
            "model.preset",
            f"{preset!r} is a folder of this machine; name a preset of the Hub, hf://owner/name",
        )
    datasets = {"data.dataset": spec.data.dataset}
    for index, item in enumerate(spec.evals.multiple_choice):
        datasets[f"evals.multiple_choice.{index}.dataset"] = item.dataset
    for path, dataset in datasets.items():
        if dataset != SAMPLES and not _is_remote(dataset):
            yield (
                path,
                f"{dataset!r} is a file of this machine; copy it into a bucket "
                "(gcloud storage cp) and write gs://bucket/path",
            )
    adapter = spec.train.init_adapter
    if adapter is not None and not _is_remote(adapter):
        yield (
            "train.init_adapter",
            f"{adapter!r} is a folder of this machine; copy it into a bucket and write "
            "gs://bucket/path",
        )


def _is_remote(uri: str) -> bool:
    return uri.startswith(("gs://", "hf://"))
