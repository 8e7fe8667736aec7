"""Sources of rows: a dataset on the Hub, files in a bucket, local files, or the shipped samples.

A source is a list of files of one commit. A remote file is downloaded to the cache and verified
just before it is read.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from job.data.readers import read_blocks
from job.data.row_blocks import Row
from job.errors import UsageError
from job.spec.fields import FILE_EXTENSIONS, SAMPLES, file_format
from job.spec.pinning import NONE, Revisions, pinned
from job.spec.schema import Source
from job.storage.base import Store, file_sha256
from job.storage.hub import CARD_FILE, SCHEME, checksum
from job.storage.locations import cache_folder, open_store

Samples = Literal["dialogues", "questions"]


@dataclass(frozen=True)
class SourceFile:
    """A file of a source."""

    name: str
    """The name in messages; its extension tells the format."""
    bytes: int
    identity: str
    """A string that changes whenever the content does."""
    fetch: Callable[[], Path]
    """Download the file if it is remote, resuming a partial download, and return its path."""
    cached: Path | None = None
    """Where the downloaded file is."""


@dataclass(frozen=True)
class RowSource:
    """The files of a source, in order."""

    revision: str | None
    """The commit of the files; None if they are not versioned."""
    files: list[SourceFile]

    def __iter__(self) -> Iterator[Row]:
        for file in self.files:
            for block in read_blocks(file.fetch(), file.name):
                yield from block.rows()


def open_source(source: Source, samples: Samples, revisions: Revisions = NONE) -> RowSource:
    """Return the rows of a source.

    Args:
        source: the section of the spec.
        samples: which of the shipped files `samples` means.
        revisions: the commits to read, by source.

    Raises:
        UsageError: there is no such file or dataset, or its content does not match its name.
        SetupError: credentials are missing.
        StageError: the Hub or the bucket cannot be reached.
    """
    if source.dataset == SAMPLES:
        path = Path(str(resources.files("job") / "samples" / f"{samples}.jsonl"))
        return RowSource(None, [_local_file(path, path.name)])
    if source.dataset.startswith(SCHEME):
        return _hub_source(source, revisions)
    if source.dataset.startswith("gs://"):
        return RowSource(None, _bucket_files(source))
    return RowSource(None, _local_files(source))


def _local_file(path: Path, name: str) -> SourceFile:
    return SourceFile(name, path.stat().st_size, file_sha256(path), lambda: path)


def _local_files(source: Source) -> list[SourceFile]:
    path = Path(source.dataset)
    if path.is_dir():
        inside = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
        readme = (path / CARD_FILE).read_bytes() if CARD_FILE in inside else None
        chosen = _choose(source, inside, readme)
        return [_local_file(path / name, str(path / name)) for name in chosen]
    if not path.is_file():
        raise UsageError(f"there is no file or folder {source.dataset}")
    if file_format(source.dataset) is None:
        raise UsageError(
            f"{source.dataset}: cannot tell the format; name it {', '.join(FILE_EXTENSIONS)}"
        )
    return [_local_file(path, source.dataset)]


def _choose(source: Source, paths: list[str], readme: bytes | None = None) -> list[str]:
    from job.data.data_files import choose_files  # imports `datasets`, which takes a second

    return choose_files(source, paths, readme)


def _bucket_files(source: Source) -> list[SourceFile]:
    if file_format(source.dataset):
        folder, _, name = source.dataset.rpartition("/")
        return [_bucket_file(open_store(folder), name)]
    store = open_store(source.dataset)
    return [
        _bucket_file(store, name) for name in _choose(source, store.list(), store.read(CARD_FILE))
    ]


def _bucket_file(store: Store, key: str) -> SourceFile:
    stat = store.stat(key)
    if stat is None:
        raise UsageError(f"there is no object {store.uri}/{key}")
    folder = cache_folder("objects", hashlib.sha256(store.uri.encode()).hexdigest()[:16])
    path = folder / f"{stat.version}-{Path(key).name}"

    def fetch() -> Path:
        if not path.is_file() and not store.download(key, path, version=stat.version):
            raise UsageError(
                f"{store.uri}/{key} changed while the job was running; run the same command again"
            )
        return path

    return SourceFile(f"{store.uri}/{key}", stat.bytes, stat.version, fetch, path)


def _hub_source(source: Source, revisions: Revisions) -> RowSource:
    repository, commit, folder = pinned(
        "dataset", source.dataset, source.revision, revisions, "datasets"
    )
    by_path = {file.path: file for file in repository.files(commit)}
    readme = None
    if CARD_FILE in by_path:
        repository.fetch(commit, [by_path[CARD_FILE]], folder)
        readme = (folder / CARD_FILE).read_bytes()
    chosen = _choose(source, list(by_path), readme)

    def source_file(name: str) -> SourceFile:
        file, path = by_path[name], folder / name

        def fetch() -> Path:
            repository.fetch(commit, [file], folder)
            return path

        return SourceFile(f"{source.dataset}/{name}", file.size, checksum(file), fetch, path)

    return RowSource(commit, [source_file(name) for name in chosen])
