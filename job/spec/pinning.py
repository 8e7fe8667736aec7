"""Which commit of each Hub repository a run uses: found once, kept with the run.

A branch moves. All stages of a run, and every resumption of it, must read the same rows and
the same weights, so names are resolved in the preflight stage and nowhere else.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from job.spec.schema import Source, Spec

Kind = Literal["dataset", "model"]


Revisions = Mapping[str, str]
"""Commit by `revision_key`."""


NONE: Revisions = MappingProxyType({})
"""No commit is known: names are resolved where they are used."""


_SCHEME = "hf://"


def revision_key(kind: Kind, repository: str, revision: str | None) -> str:
    """The name a commit is kept under."""
    return f"{kind}:{repository}@{revision or ''}"


def source_key(source: Source) -> str | None:
    """The name of a source's commit; None where it is not of the Hub."""
    if not source.dataset.startswith(_SCHEME):
        return None
    return revision_key("dataset", source.dataset.removeprefix(_SCHEME), source.revision)


def model_key(spec: Spec) -> str | None:
    """The name of the model's commit; None where it is not of the Hub."""
    if not spec.model.preset.startswith(_SCHEME):
        return None
    return revision_key("model", spec.model.preset.removeprefix(_SCHEME), spec.model.revision)


def adapter_key(spec: Spec) -> str | None:
    """The name of the commit of the adapter to go on from; None where it is not of the Hub."""
    adapter = spec.train.init_adapter
    if adapter is None or not adapter.startswith(_SCHEME):
        return None
    return revision_key("model", adapter.removeprefix(_SCHEME), None)


def resolve_commit(kind: Kind, repository: str, revision: str | None) -> str:
    """The commit a revision names now.

    Raises:
        UsageError, EnvironmentProblem, StageError: see `job.storage.hub.Repository.errors`.
    """
    from job.storage.hub import Repository

    return Repository(kind, repository, revision).commit()


def resolve_all(spec: Spec, known: Revisions) -> dict[str, str]:
    """The commits of everything the spec names on the Hub; those known are kept."""
    wanted: dict[str, tuple[Kind, str, str | None]] = {}
    for source in (spec.data, *spec.evals.multiple_choice):
        if key := source_key(source):
            wanted[key] = ("dataset", source.dataset.removeprefix(_SCHEME), source.revision)
    if key := model_key(spec):
        wanted[key] = ("model", spec.model.preset.removeprefix(_SCHEME), spec.model.revision)
    if (key := adapter_key(spec)) and spec.train.init_adapter:
        wanted[key] = ("model", spec.train.init_adapter.removeprefix(_SCHEME), None)
    return {key: known.get(key) or resolve_commit(*what) for key, what in wanted.items()}
