"""What a run is told apart from its spec's fields: its id, and the local files it reads."""

import re
from pathlib import Path

from job.errors import UsageError
from job.spec.fields import SAMPLES
from job.spec.load import run_id
from job.spec.schema import Spec


def checked_id(given: str | None, spec: Spec) -> str:
    """The run id: the one given, or the spec's own.

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


def check_inputs(spec: Spec) -> None:
    """Local input files must be there before anything is started or written.

    Raises:
        UsageError: one is not.
    """
    preset = spec.model.preset
    if "/" in preset and "://" not in preset and not Path(preset).is_dir():
        raise UsageError(
            f"model.preset: there is no folder {preset!r}; for a model of the Hub write "
            "hf://owner/name"
        )
    for where, source in (
        ("data", spec.data),
        *((f"evals.multiple_choice.{i}", s) for i, s in enumerate(spec.evals.multiple_choice)),
    ):
        if source.dataset == SAMPLES or "://" in source.dataset:
            continue
        if source.data_files is not None:
            if not Path(source.dataset).is_dir():
                raise UsageError(f"{where}.dataset: there is no folder {source.dataset!r}")
        elif not Path(source.dataset).is_file():
            raise UsageError(
                f"{where}.dataset: there is no file {source.dataset!r}; "
                "for a dataset of the Hub write hf://owner/name"
            )
