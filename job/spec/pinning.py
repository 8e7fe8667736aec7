"""Commits of the Hub repositories that a run uses.

A branch moves. All stages of a run, and every time it is resumed, must read the same rows and the
same weights, so the preflight stage resolves names to commits once and records them.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from job.spec.schema import Spec
from job.storage.hub import SCHEME, Repository, RepoType
from job.storage.locations import cache_folder

Revisions = Mapping[str, str]
"""Commit by `hub_key`."""

NONE: Revisions = MappingProxyType({})
"""No known commits: names are resolved where they are used."""


def hub_key(kind: RepoType, uri: str | None, revision: str | None = None) -> str | None:
    """Return the key that a repository's commit is recorded under; None if it is not on the Hub."""
    if uri is None or not uri.startswith(SCHEME):
        return None
    return f"{kind}:{uri.removeprefix(SCHEME)}@{revision or ''}"


def commit_of(kind: RepoType, uri: str, revision: str | None, revisions: Revisions) -> str:
    """Return the known commit of a repository on the Hub, or the one its revision names now.

    Raises:
        UsageError, SetupError, StageError: see `job.storage.hub.Repository.errors`.
    """
    known = revisions.get(hub_key(kind, uri, revision) or "")
    return known or Repository(kind, uri.removeprefix(SCHEME), revision).commit()


def pinned(
    kind: RepoType, uri: str, revision: str | None, revisions: Revisions, cache: str
) -> tuple[Repository, str, Path]:
    """Return a repository on the Hub, its commit, and the cache's folder for files of that commit.

    Raises:
        UsageError, SetupError, StageError: see `job.storage.hub.Repository.errors`.
    """
    name = uri.removeprefix(SCHEME)
    commit = commit_of(kind, uri, revision, revisions)
    folder = cache_folder(cache, name.replace("/", "--"), commit)
    return Repository(kind, name, revision), commit, folder


def resolve_all(spec: Spec, known: Revisions) -> dict[str, str]:
    """Return the commits of everything the spec names on the Hub, reusing those already known."""
    used: list[tuple[RepoType, str | None, str | None]] = [
        *(("dataset", source.dataset, source.revision) for source in spec.sources.values()),
        ("model", spec.model.preset, spec.model.revision),
        ("model", spec.train.init_adapter, None),
    ]
    revisions: dict[str, str] = {}
    for kind, uri, revision in used:
        if uri and (key := hub_key(kind, uri, revision)):
            revisions[key] = commit_of(kind, uri, revision, {**known, **revisions})
    return revisions
