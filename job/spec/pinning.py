"""Commits of the Hub repositories that a run uses.

A branch moves. All stages of a run, and every time it is resumed, must read the same rows and the
same weights, so the preflight stage resolves names to commits once and records them.
"""

from collections.abc import Mapping
from types import MappingProxyType

from job.spec.schema import Source, Spec
from job.storage.hub import RepoType

Revisions = Mapping[str, str]
"""Commit by `revision_key`."""

NONE: Revisions = MappingProxyType({})
"""No known commits: names are resolved where they are used."""

_SCHEME = "hf://"


def revision_key(kind: RepoType, repository: str, revision: str | None) -> str:
    """Return the key a commit is recorded under."""
    return f"{kind}:{repository}@{revision or ''}"


def source_key(source: Source) -> str | None:
    """Return the key of a dataset's commit; None if it is not on the Hub."""
    if not source.dataset.startswith(_SCHEME):
        return None
    return revision_key("dataset", source.dataset.removeprefix(_SCHEME), source.revision)


def model_key(spec: Spec) -> str | None:
    """Return the key of the model's commit; None if it is not on the Hub."""
    if not spec.model.preset.startswith(_SCHEME):
        return None
    return revision_key("model", spec.model.preset.removeprefix(_SCHEME), spec.model.revision)


def adapter_key(spec: Spec) -> str | None:
    """Return the key of the initial adapter's commit; None if it is not on the Hub."""
    adapter = spec.train.init_adapter
    if adapter is None or not adapter.startswith(_SCHEME):
        return None
    return revision_key("model", adapter.removeprefix(_SCHEME), None)


def resolve_commit(kind: RepoType, repository: str, revision: str | None) -> str:
    """Return the commit that a revision names now.

    Raises:
        UsageError, SetupError, StageError: see `job.storage.hub.Repository.errors`.
    """
    from job.storage.hub import Repository

    return Repository(kind, repository, revision).commit()


def resolve_all(spec: Spec, known: Revisions) -> dict[str, str]:
    """Return the commits of everything the spec names on the Hub, reusing those already known."""
    revisions: dict[str, tuple[RepoType, str, str | None]] = {}
    for source in spec.sources.values():
        if key := source_key(source):
            revisions[key] = ("dataset", source.dataset.removeprefix(_SCHEME), source.revision)
    if key := model_key(spec):
        revisions[key] = ("model", spec.model.preset.removeprefix(_SCHEME), spec.model.revision)
    if (key := adapter_key(spec)) and spec.train.init_adapter:
        revisions[key] = ("model", spec.train.init_adapter.removeprefix(_SCHEME), None)
    return {key: known.get(key) or resolve_commit(*what) for key, what in revisions.items()}
