"""Where rows are: a dataset of the Hub, files of a bucket, local files, or the samples.

A source is a list of files of one commit. A file of the Hub or of a bucket is brought to the
cache, its checksum checked, just before it is read, and can be put away right after it.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from job.data.blocks import Row
from job.data.readers import format_of, read_blocks
from job.errors import UsageError
from job.spec.fields import FORMATS, SAMPLES
from job.spec.pinning import NONE, Revisions, resolve_commit, source_key
from job.spec.schema import Source
from job.storage.base import Store, file_sha256
from job.storage.cache_folder import cache_folder
from job.storage.hub import README, SCHEME, HubFile, Repository
from job.storage.locations import open_store

__all__ = ["Row", "RowSource", "SourceFile", "open_source"]


Samples = Literal["dialogues", "questions"]


@dataclass(frozen=True)
class SourceFile:
    """A file of a source."""

    name: str
    """What it is called in messages; its ending tells the format."""
    bytes: int
    identity: str
    """Changes whenever the content does."""
    bring: Callable[[], Path]
    """Makes it local and gives its path; a call that was interrupted goes on where it stopped."""
    discard: Callable[[], None] = lambda: None
    """Frees the disk space that `bring` took."""


@dataclass(frozen=True)
class RowSource:
    """The files of a source, in order, and the commit they are of (None if unversioned)."""

    revision: str | None
    files: list[SourceFile]

    def __iter__(self) -> Iterator[Row]:
        for file in self.files:
            for block in read_blocks(file.bring(), file.name):
                yield from block.rows()


def open_source(source: Source, samples: Samples, revisions: Revisions = NONE) -> RowSource:
    """The rows of a source, of the commit in `revisions` if it has one.

    Raises:
        UsageError: there is no such file or dataset, or it is not what its name says.
        EnvironmentProblem: credentials are asked for that are not there.
        StageError: the Hub or the bucket cannot be reached.
    """
    if source.dataset == SAMPLES:
        path = Path(str(resources.files("job") / "samples" / f"{samples}.jsonl"))
        return RowSource(None, [_local(path, path.name)])
    if source.dataset.startswith(SCHEME):
        return _of_hub(source, revisions)
    if source.dataset.startswith("gs://"):
        return RowSource(None, _of_bucket(source))
    return RowSource(None, _of_folder(source))


def _local(path: Path, name: str) -> SourceFile:
    return SourceFile(name, path.stat().st_size, file_sha256(path), lambda: path)


def _of_folder(source: Source) -> list[SourceFile]:
    path = Path(source.dataset)
    if path.is_dir():
        inside = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
        return [_local(path / name, str(path / name)) for name in _chosen(source, inside)]
    if format_of(path.name) is None:
        raise UsageError(
            f"{source.dataset}: cannot tell the format; name it {', '.join(sorted(FORMATS))}"
        )
    if not path.is_file():
        raise UsageError(f"there is no file {source.dataset}")
    return [_local(path, source.dataset)]


def _chosen(source: Source, paths: list[str], readme: bytes | None = None) -> list[str]:
    from job.data.data_files import choose_files  # imports `datasets`, which takes a second

    return choose_files(
        paths,
        where=source.dataset,
        split=source.split,
        config=source.config,
        data_files=source.data_files,
        readme=readme,
    )


def _of_bucket(source: Source) -> list[SourceFile]:
    if source.data_files is None:
        folder, _, name = source.dataset.rpartition("/")
        return [_object(open_store(folder), name)]
    store = open_store(source.dataset)
    return [_object(store, name) for name in _chosen(source, store.list())]


def _object(store: Store, key: str) -> SourceFile:
    found = store.stat(key)
    if found is None:
        raise UsageError(f"there is no object {store.uri}/{key}")
    folder = cache_folder("objects", hashlib.sha256(store.uri.encode()).hexdigest()[:16])
    path = folder / f"{found.version}-{Path(key).name}"

    def bring() -> Path:
        if not path.is_file() and not store.download(key, path, version=found.version):
            raise UsageError(f"{store.uri}/{key} was changed while the job ran; start it again")
        return path

    def discard() -> None:
        path.unlink(missing_ok=True)

    return SourceFile(f"{store.uri}/{key}", found.bytes, found.version, bring, discard)


def _of_hub(source: Source, revisions: Revisions) -> RowSource:
    name = source.dataset.removeprefix(SCHEME)
    commit = revisions.get(source_key(source) or "") or resolve_commit(
        "dataset", name, source.revision
    )
    repository = Repository("dataset", name, source.revision)
    listed = repository.files(commit)
    by_path = {file.path: file for file in listed}
    folder = cache_folder("datasets", name.replace("/", "--"), commit)
    readme = None
    if README in by_path:
        repository.fetch(commit, [by_path[README]], folder)
        readme = (folder / README).read_bytes()
    chosen = _chosen(source, list(by_path), readme)

    def of_hub(file: HubFile) -> SourceFile:
        def bring() -> Path:
            repository.fetch(commit, [file], folder)
            return folder / file.path

        def discard() -> None:
            (folder / file.path).unlink(missing_ok=True)

        shown = f"{source.dataset}/{file.path}"
        return SourceFile(shown, file.size, file.sha256 or file.sha1, bring, discard)

    return RowSource(commit, [of_hub(by_path[path]) for path in chosen])
