"""Which files of a repository or a folder a split is made of.

What the spec names; else what the `configs` of the README's header say; else what the names of
files and folders say (`data/train-00000-of-00002.parquet`, `validation/a.jsonl`), where what
names no split is all `train`. The rules are those of Hub datasets, and `datasets` applies them,
to a list of paths: nothing is read or downloaded.
See https://huggingface.co/docs/hub/datasets-data-files-configuration.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from datasets import DownloadConfig
from datasets.data_files import (
    EmptyDatasetError,
    get_data_patterns,
    resolve_pattern,
    sanitize_patterns,
)
from datasets.utils.metadata import MetadataConfigs
from fsspec import AbstractFileSystem, register_implementation
from huggingface_hub import DatasetCard

from job.data.readers import format_of
from job.errors import UsageError
from job.storage.hub import README

_ROOT = "listing://files"


_JSON = (".json", ".jsonl", ".ndjson")


class _Listing(AbstractFileSystem):  # type: ignore[misc]
    """Files of which only the paths are known."""

    protocol = "listing"
    cachable = False

    def __init__(self, folders: Mapping[str, Mapping[str, str]], **rest: Any) -> None:
        super().__init__(**rest)
        self._folders = folders

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What a folder holds."""
        inside = self._folders.get(self._strip_protocol(path))
        if inside is None:
            raise FileNotFoundError(path)
        if not detail:
            return list(inside)
        return [{"name": name, "size": None, "type": kind} for name, kind in inside.items()]


class _Files:
    """Paths that patterns are looked for among."""

    def __init__(self, paths: Sequence[str]) -> None:
        register_implementation(_Listing.protocol, _Listing, clobber=True)
        folders: dict[str, dict[str, str]] = {"files": {}}
        for path in paths:
            whole, kind = f"files/{path}", "file"
            while "/" in whole:
                folder, _, _ = whole.rpartition("/")
                folders.setdefault(folder, {})[whole] = kind
                whole, kind = folder, "directory"
        self.paths = paths
        self._config = DownloadConfig(storage_options={_Listing.protocol: {"folders": folders}})

    def patterns(self, folder: str) -> dict[str, list[str]]:
        """The patterns of each split, by the names of the files in a folder."""
        try:
            found: dict[str, list[str]] = get_data_patterns(_inside(folder), self._config)
        except EmptyDatasetError:
            return {}
        return {str(split): patterns for split, patterns in found.items()}

    def matching(self, pattern: str, folder: str) -> list[str]:
        """The files a pattern stands for, in order; none that lie elsewhere."""
        if pattern.startswith(("/", "~")) or "::" in pattern or "://" in pattern:
            return []
        pattern = pattern.removeprefix("./")
        try:
            found = resolve_pattern(pattern, _inside(folder), download_config=self._config)
        except FileNotFoundError:
            return []
        return sorted(path.removeprefix(f"{_ROOT}/") for path in found)


def _inside(folder: str) -> str:
    return f"{_ROOT}/{folder}" if folder else _ROOT


def choose_files(
    paths: Sequence[str],
    *,
    where: str,
    split: str,
    config: str | None = None,
    data_files: Sequence[str] | None = None,
    readme: bytes | None = None,
) -> list[str]:
    """The paths of a split's files, in order.

    Args:
        paths: all files there are.
        where: what holds them, for messages.
        data_files: paths or patterns, where the spec names them; they make the split `train`.

    Raises:
        UsageError: there is no such configuration, split or file.
    """
    readable = sorted(path for path in paths if format_of(path))
    if data_files is not None:
        if config is not None:
            raise UsageError(f"data_files take the place of a config of {where}; remove one")
        return _split(_Files(readable), {"train": list(data_files)}, "", split, where)
    configs = _configs(readme, where)
    if configs:
        chosen = configs[_config(configs, config, where)]
    elif config not in (None, "default"):
        raise UsageError(f"{where} has no config {config!r}; it has only `default`")
    else:
        chosen = {}
    folder = str(chosen.get("data_dir") or "").removeprefix("./").strip("/")
    if given := chosen.get("data_files"):
        with _refused(where, f"`configs` of the {README}"):
            patterns = sanitize_patterns(given)
        return _split(_Files(readable), patterns, folder, split, where)
    files = _Files(_of_one_kind(_Files(readable).matching("**", folder)))
    with _refused(where, "names of the files"):
        patterns = files.patterns(folder)
    if not patterns:
        raise UsageError(f"{where} has no file in a format that can be read")
    return _split(files, patterns, folder, split, where, each=False)


def _configs(readme: bytes | None, where: str) -> MetadataConfigs:
    text = (readme or b"").decode("utf-8-sig", "replace").lstrip()
    if not text.startswith("---"):
        return MetadataConfigs()
    with _refused(where, f"header of the {README}"):
        card = DatasetCard(text, ignore_metadata_errors=True)
        return MetadataConfigs.from_dataset_card_data(card.data)


@contextlib.contextmanager
def _refused(where: str, what: str) -> Iterator[None]:
    """Within this block, what `datasets` makes of what others wrote is an error with a way out."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{where}: the {what} cannot be used: {reason:.200}; write the files to read in "
            "data_files"
        ) from None


def _config(configs: MetadataConfigs, wanted: str | None, where: str) -> str:
    names = ", ".join(configs)
    if wanted is None:
        try:
            wanted = configs.get_default_config_name()
        except ValueError:  # more than one says that it is
            wanted = None
        if wanted is None:
            raise UsageError(f"{where} has several configs; write one of {names} in config")
    if wanted not in configs:
        raise UsageError(f"{where} has no config {wanted!r}; it has {names}")
    return wanted


def _of_one_kind(paths: Sequence[str]) -> list[str]:
    """Those of the commonest format; all that is JSON is of one."""
    kinds = {path: "json" if (kind := format_of(path)) in _JSON else kind for path in paths}
    counts = Counter(kinds.values())
    commonest = max(counts, key=lambda kind: (counts[kind], kind or ""), default=None)
    return [path for path in paths if kinds[path] == commonest]


def _split(
    files: _Files,
    patterns: Mapping[str, Sequence[str]],
    folder: str,
    split: str,
    where: str,
    *,
    each: bool = True,
) -> list[str]:
    """The files of a split; with `each`, every one of its patterns has to stand for some."""
    if split not in patterns:
        raise UsageError(f"{where} has no split {split!r}; it has {', '.join(sorted(patterns))}")
    found: list[str] = []
    for pattern in map(str, patterns[split]):
        hits = files.matching(pattern, folder)
        if each and not hits:
            whole = f"{folder}/{pattern}" if folder else pattern
            raise UsageError(f"{where} has no readable file {whole!r}; it has {_some(files.paths)}")
        found += hits
    return list(dict.fromkeys(found))


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "") if paths else "none"
