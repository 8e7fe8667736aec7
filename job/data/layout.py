"""Which files of a repository or a folder a split is made of.

The rules are those of Hub datasets: what the spec names; else what the `configs` of the
README's header say; else the names of files and folders (`data/train-00000-of-00002.parquet`,
`validation/a.jsonl`), where what names no split is all `train`.
See https://huggingface.co/docs/hub/datasets-data-files-configuration.
"""

import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import translate
from typing import Any

import yaml

from job.data.readers import format_of
from job.errors import UsageError

README = "README.md"

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARDED = re.compile(r"data/(\w+)-\d{5}-of-\d{5}\.[\w.]+")


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
    readable = sorted(path for path in paths if format_of(path) and not _hidden(path))
    if data_files is not None:
        if config is not None:
            raise UsageError(f"data_files take the place of a config of {where}; remove one")
        return _split({"train": _matching(readable, data_files, "", where)}, split, where)
    configs = _configs(readme)
    if not configs:
        if config not in (None, "default"):
            raise UsageError(f"{where} has no config {config!r}; it has only `default`")
        return _split(_by_name(readable), split, where)
    chosen = _config(configs, config, where)
    folder = str(chosen.get("data_dir") or "").strip("/")
    given = chosen.get("data_files")
    if given is None:
        inside = [path for path in readable if not folder or path.startswith(f"{folder}/")]
        return _split(_by_name(inside, folder), split, where)
    patterns = _patterns(given)
    if split not in patterns:
        raise _no_split(split, list(patterns), where)
    return _matching(readable, patterns[split], folder, where)


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "__")) for part in path.split("/"))


def _configs(readme: bytes | None) -> list[dict[str, Any]]:
    text = (readme or b"").decode("utf-8", "replace")
    found = re.match(r"\ufeff?---\r?\n(.*?)\n---", text, re.DOTALL)
    if not found:
        return []
    try:
        header = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return []
    configs = header.get("configs") if isinstance(header, dict) else None
    return [c for c in configs or [] if isinstance(c, dict) and c.get("config_name")]


def _config(configs: list[dict[str, Any]], wanted: str | None, where: str) -> dict[str, Any]:
    names = [str(config["config_name"]) for config in configs]
    if wanted is not None:
        if wanted not in names:
            raise UsageError(f"{where} has no config {wanted!r}; it has {', '.join(names)}")
        return configs[names.index(wanted)]
    for config in configs:
        if config.get("default") is True or config["config_name"] == "default":
            return config
    if len(configs) > 1:
        raise UsageError(f"{where} has several configs; write one of {', '.join(names)} in config")
    return configs[0]


def _patterns(given: Any) -> dict[str, list[str]]:
    """Patterns by split, from the forms that `data_files` has in a README."""
    if isinstance(given, dict):
        given = [{"split": split, "path": path} for split, path in given.items()]
    items = given if isinstance(given, list) else [given]
    patterns: dict[str, list[str]] = {}
    for item in items:
        split, path = ("train", item)
        if isinstance(item, dict):
            split, path = str(item.get("split", "train")), item.get("path", [])
        patterns.setdefault(split, []).extend(path if isinstance(path, list) else [str(path)])
    return patterns


def _matching(paths: Sequence[str], patterns: Sequence[str], folder: str, where: str) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        whole = f"{folder}/{pattern}" if folder else pattern
        hits = [path for path in paths if path == whole] or [
            path for path in paths if _glob(whole).fullmatch(path)
        ]
        if not hits:
            raise UsageError(f"{where} has no readable file {whole!r}; it has {_some(paths)}")
        found += [path for path in hits if path not in found]
    return found


def _glob(pattern: str) -> re.Pattern[str]:
    """A pattern where `*` stays inside a folder and `**` does not."""
    made = ""
    for part in re.split(r"(\*\*/|\*\*|\*)", pattern.removeprefix("./")):
        if part == "**/":
            made += r"(?:.*/)?"
        elif part == "**":
            made += r".*"
        elif part == "*":
            made += r"[^/]*"
        else:
            made += translate(part).removeprefix("(?s:").removesuffix(r")\Z")
    return re.compile(made, re.DOTALL)


def _by_name(paths: Sequence[str], folder: str = "") -> dict[str, list[str]]:
    """Files by split, by what their names say; only those of the commonest format."""
    formats = Counter(format_of(path) for path in paths)
    if not formats:
        return {}
    commonest = max(formats, key=lambda kind: (formats[kind], kind or ""))
    paths = [path for path in paths if format_of(path) == commonest]
    sharded: dict[str, list[str]] = {}
    named: dict[str, list[str]] = {}
    for path in paths:
        inside = path.removeprefix(f"{folder}/") if folder else path
        if found := _SHARDED.fullmatch(inside):
            sharded.setdefault(found[1], []).append(path)
        for split, words in _SPLITS.items():
            any_word = "|".join(words)
            if re.search(rf"(?:^|[/._ 0-9-])(?:{any_word})(?:[/._ 0-9-]|$)", inside):
                named.setdefault(split, []).append(path)
                break
    return sharded or named or {"train": list(paths)}


def _split(files: dict[str, list[str]], split: str, where: str) -> list[str]:
    if not any(files.values()):
        raise UsageError(f"{where} has no file in a format that can be read")
    if split not in files:
        raise _no_split(split, sorted(files), where)
    return files[split]


def _no_split(split: str, known: list[str], where: str) -> UsageError:
    return UsageError(f"{where} has no split {split!r}; it has {', '.join(known)}")


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "") if paths else "none"
