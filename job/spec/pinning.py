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
    return _hub_key("dataset", source.dataset, source.revision)


def model_key(spec: Spec) -> str | None:
    """Return the key of the model's commit; None if it is not on the Hub."""
    return _hub_key("model", spec.model.preset, spec.model.revision)


def adapter_key(spec: Spec) -> str | None:
    """Return the key of the initial adapter's commit; None if it is not on the Hub."""
    return _hub_key("model", spec.train.init_adapter or "", None)


def _hub_key(kind: RepoType, uri: str, revision: str | None) -> str | None:
    on_hub = uri.startswith(_SCHEME)
    return revision_key(kind, uri.removeprefix(_SCHEME), revision) if on_hub else None


def resolve_commit(kind: RepoType, repository: str, revision: str | None) -> str:
    """Return the commit that a revision names now.

    Raises:
        UsageError, SetupError, StageError: see `job.storage.hub.Repository.errors`.
    """
    from job.storage.hub import Repository

    return Repository(kind, repository, revision).commit()


def resolve_all(spec: Spec, known: Revisions) -> dict[str, str]:
    """Return the commits of everything the spec names on the Hub, reusing those already known."""
    model, adapter = spec.model, spec.train.init_adapter or ""
    named: list[tuple[RepoType, str, str | None]] = [
        *(("dataset", s.dataset, s.revision) for s in (spec.data, *spec.evals.multiple_choice)),
        ("model", model.preset, model.revision),
        ("model", adapter, None),
    ]
    revisions = {}
    for kind, uri, revision in named:
        if key := _hub_key(kind, uri, revision):
            name = uri.removeprefix(_SCHEME)
            revisions[key] = known.get(key) or resolve_commit(kind, name, revision)
    return revisions
