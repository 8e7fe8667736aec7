"""The files of a split, among the files of a repository or a folder.

They come from the spec's `data_files`; else from where `save_to_disk` put them; else from the
`configs` in the README's header; else from the names of files and folders
(`data/train-00000-of-00002.parquet`, `validation/a.jsonl`), where names without a split are
`train`. These are the rules of Hub datasets; `datasets` applies them to a list of paths, so
nothing is read or downloaded.
See https://huggingface.co/docs/hub/datasets-data-files-configuration.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

import yaml
from datasets import DownloadConfig
from datasets.data_files import (
    EmptyDatasetError,
    get_data_patterns,
    resolve_pattern,
    sanitize_patterns,
)
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

from job.errors import UsageError
from job.spec.fields import file_format
from job.spec.schema import Source
from job.storage.hub import CARD_FILE

_ROOT = "reference://"
"""The file system of fsspec that lists the paths it is given."""

_JSON = (".json", ".jsonl", ".ndjson")
_SAVED = "state.json"
"""A file that `save_to_disk` of Hugging Face datasets writes beside the rows of a split."""


class _Files:
    """Paths to match patterns against."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        files = {"fo": dict.fromkeys(paths, ""), "skip_instance_cache": True}
        self._config = DownloadConfig(storage_options={"reference": files})

    def patterns(self, folder: str) -> dict[str, list[str]]:
        """Return the patterns of each split, from the names of the files in a folder."""
        try:
            by_split: dict[str, list[str]] = get_data_patterns(_ROOT + folder, self._config)
        except EmptyDatasetError:
            return {}
        return {str(split): patterns for split, patterns in by_split.items()}

    def matching(self, pattern: str, folder: str) -> list[str]:
        """Return the files in a folder that match a pattern, sorted."""
        if pattern.startswith(("/", "~")) or "::" in pattern or "://" in pattern:
            return []
        pattern = pattern.removeprefix("./")
        try:
            matches = resolve_pattern(pattern, _ROOT + folder, download_config=self._config)
        except FileNotFoundError:
            return []
        return sorted(path.removeprefix(_ROOT) for path in matches)


def choose_files(source: Source, paths: Sequence[str], readme: bytes | None = None) -> list[str]:
    """Return the paths of a split's files, in order.

    Args:
        source: the section of the spec; `data_files` make the split `train`.
        paths: all files of the repository or folder.
        readme: the content of the README, if there is one.

    Raises:
        UsageError: there is no such configuration, split or file.
    """
    where, config = source.dataset, source.config
    readable = sorted(path for path in paths if file_format(path))
    if source.data_files is not None:
        if config is not None:
            raise UsageError(
                f"data_files and config cannot both be set for {where}; remove one of them"
            )
        return _split_files(_Files(readable), {"train": source.data_files}, "", source)
    if saved := _saved_splits(paths):
        return _split_files(_Files(readable), saved, "", source)
    configs = _configs(readme, where)
    if configs:
        chosen = configs[_config(configs, config, where)]
    elif config not in (None, "default"):
        raise UsageError(f"{where} has no config {config!r}; it has only `default`")
    else:
        chosen = {}
    script = f"{PurePosixPath(where).name}.py"
    if script in paths and not configs:  # a program, named as its repository
        raise UsageError(
            f"{where}: its rows come from a loading script ({script}), which is not run here; set "
            "revision: refs/convert/parquet, where the Hub may have them as Parquet, or write the "
            "files to read in data_files"
        )
    folder = str(chosen.get("data_dir") or "").removeprefix("./").strip("/")
    if listed := chosen.get("data_files"):
        with _as_usage_error(where, f"`configs` of the {CARD_FILE}"):
            patterns = sanitize_patterns(listed)
        return _split_files(_Files(readable), patterns, folder, source)
    files = _Files(_most_common_format(_Files(readable).matching("**", folder)))
    with _as_usage_error(where, "names of the files"):
        patterns = files.patterns(folder)
    if not patterns:
        raise UsageError(f"{where} has no file in a format that can be read")
    return _split_files(files, patterns, folder, source, strict=False)


def _saved_splits(paths: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of each split that `save_to_disk` wrote, alone or in a folder by name."""
    folders = [PurePosixPath(path).parent for path in paths if PurePosixPath(path).name == _SAVED]
    return {
        folder.name or "train": [(folder / "data*.arrow").as_posix()]
        for folder in folders
        if len(folder.parts) < 2
    }


def _configs(readme: bytes | None, where: str) -> MetadataConfigs:
    text = (readme or b"").decode("utf-8-sig", "replace").lstrip()
    if not text.startswith("---"):
        return MetadataConfigs()
    with _as_usage_error(where, f"header of the {CARD_FILE}"):
        card = DatasetCard(text, ignore_metadata_errors=True)
        return MetadataConfigs.from_dataset_card_data(card.data)


@contextlib.contextmanager
def _as_usage_error(where: str, what: str) -> Iterator[None]:
    """Turn errors of `datasets` about what others wrote into one with a way out."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{where}: the {what} cannot be used: {reason:.200}; write the files to read in "
            "data_files"
        ) from None


def _config(configs: MetadataConfigs, name: str | None, where: str) -> str:
    names = ", ".join(configs)
    if name is None:
        with contextlib.suppress(ValueError):  # several configs are marked as the default
            name = configs.get_default_config_name()
        if name is None:
            raise UsageError(f"{where} has several configs; write one of {names} in config")
    if name not in configs:
        raise UsageError(f"{where} has no config {name!r}; it has {names}")
    return name


def _most_common_format(paths: Sequence[str]) -> list[str]:
    """Return the files of the most common format; all kinds of JSON count as one."""
    formats = {path: "json" if (kind := file_format(path)) in _JSON else kind for path in paths}
    counts = Counter(formats.values())
    most_common = max(counts, key=lambda kind: (counts[kind], kind or ""), default=None)
    return [path for path in paths if formats[path] == most_common]


def _split_files(
    files: _Files,
    patterns: Mapping[str, Sequence[str]],
    folder: str,
    source: Source,
    *,
    strict: bool = True,
) -> list[str]:
    """Return the files of a split; if `strict`, each of its patterns must match a file."""
    where, split = source.dataset, source.split
    if split not in patterns:
        raise UsageError(f"{where} has no split {split!r}; it has {', '.join(sorted(patterns))}")
    chosen: list[str] = []
    for pattern in map(str, patterns[split]):
        matches = files.matching(pattern, folder)
        if strict and not matches:
            path = f"{folder}/{pattern}" if folder else pattern
            some = ", ".join(files.paths[:5]) or "none"
            more = ", ..." if len(files.paths) > 5 else ""
            raise UsageError(f"{where} has no readable file {path!r}; it has {some}{more}")
        chosen += matches
    return list(dict.fromkeys(chosen))
