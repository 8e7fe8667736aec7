"""From YAML text to a checked `Spec`, or to all of its problems, each with its path and line.

A spec is a path, a gs:// URI, or the name of a shipped spec. `--set a.b=c` replaces a value
before validation, and a problem with it is reported at the flag instead of a line. There is no
interpolation of any kind: values are taken literally.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from job.errors import Problem, SpecError, UsageError
from job.spec.evals import METRICS
from job.spec.fields import SAMPLES, is_template_file
from job.spec.problems import (
    Location,
    SourceMap,
    describe_errors,
    dotted,
    forbidden_text,
    in_file_order,
)
from job.spec.schema import Spec

_MAX_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class LoadedSpec:
    """A validated spec and the path, URI or name it was loaded from."""

    spec: Spec
    source: str


def digest(value: object) -> str:
    """Return the SHA-256, in hex, of `value` as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def run_id(spec: Spec) -> str:
    """Return the default run id: the name, and a digest of what determines the adapter.

    Evaluations are left out on purpose: a changed evaluation reuses the training of the same run.
    """
    parts = spec.model_dump(mode="json", include={"name", "seed", "model", "data", "train"})
    return f"{spec.name}-{digest(parts)[:10]}"


def shipped_specs() -> list[str]:
    """Return the names of the specs in the package."""
    folder = resources.files("job") / "specs"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_source(source: str) -> tuple[str, str]:
    """Return the text of a spec and the name to report its problems under.

    JOB_SPEC may hold the text itself, which has a line break or begins like JSON.

    Raises:
        UsageError: there is no such path, URI or shipped spec.
    """
    if source == os.environ.get("JOB_SPEC") and re.search(r"\n|^\s*\{", source):
        return source, "JOB_SPEC"
    if source.startswith("gs://"):
        from job.storage.locations import read_uri

        return read_uri(source).decode("utf-8", errors="replace"), source
    if os.path.isfile(source):  # noqa: PTH113 - False for a name that no file can have
        try:
            return Path(source).read_text(encoding="utf-8"), source
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{source}: not UTF-8 text ({error.reason} at byte {error.start})"
            ) from None
        except OSError as error:
            raise UsageError(f"{source}: cannot be read: {error.strerror}") from None
    names = shipped_specs()
    if source in names:
        return (resources.files("job") / "specs" / f"{source}.yaml").read_text("utf-8"), source
    near = difflib.get_close_matches(source, names, 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UsageError(
        f"no spec '{source}': there is no such file, and the shipped specs are "
        f"{', '.join(names)}{hint}"
    )


def load_spec(source: str, overrides: Sequence[str] = ()) -> LoadedSpec:
    """Read a spec, apply overrides and validate it.

    Raises:
        UsageError: there is no such spec.
        SpecError: it is wrong; holds all problems.
    """
    text, name = read_source(source)
    return LoadedSpec(parse_spec(text, name, overrides), name)


def parse_spec(text: str, name: str, overrides: Sequence[str] = ()) -> Spec:
    """Check the YAML `text` of a spec, called `name` in messages.

    Raises:
        SpecError: it is wrong; holds all problems.
    """
    source = SourceMap()
    document, problems = _parse_yaml(text, name, source)
    for override in overrides:
        problem = _apply_override(document, override, source)
        if problem:
            problems.append(problem)
    try:
        problems += forbidden_text(document, source)
        spec = Spec.model_validate(document)
    except ValidationError as error:
        reported = {problem.path for problem in problems}
        described = describe_errors(error.errors(), source)
        problems += [problem for problem in described if problem.path not in reported]
    else:
        if not problems:
            return spec
    raise SpecError(in_file_order(problems))


class _Loader(yaml.SafeLoader):
    """A loader without aliases, which can make a short text expand to any size."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"*{event.anchor} is an alias; write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


def _parse_yaml(text: str, name: str, source: SourceMap) -> tuple[dict[str, Any], list[Problem]]:
    problems: list[Problem] = []
    if len(text) > _MAX_CHARACTERS:
        message = f"a spec has at most {_MAX_CHARACTERS:,} characters, but this has {len(text):,}"
        raise SpecError([Problem(name, "", message)])
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            document = None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
        if root is not None:
            source[()] = f"{name}:{root.start_mark.line + 1}"
            problems += _collect_lines(root, (), name, source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        detail = " ".join(part for part in (error.context, error.problem) if part)
        raise SpecError([Problem(where, "", f"not valid YAML: {detail}")]) from None
    except RecursionError:
        raise SpecError([Problem(name, "", "not valid YAML: nested too deeply")]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError([Problem(name, "", f"not valid YAML: {error}")]) from None
    if not isinstance(document, dict):
        kind = "an empty file" if document is None else f"a {type(document).__name__}"
        message = f"a spec is a mapping of sections (name, model, data, ...), but this is {kind}"
        raise SpecError([Problem(f"{name}:1", "", message)])
    return document, problems


def _collect_lines(
    node: yaml.Node, at: Location, name: str, source: SourceMap
) -> Iterator[Problem]:
    """Record the line of every key and item; yield a problem for each key given twice."""
    items: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        items = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        items = [(index, value, value) for index, value in enumerate(node.value)]
    for part, key, value in items:
        place, where = (*at, part), f"{name}:{key.start_mark.line + 1}"
        if place in source:
            first = source[place].rpartition(":")[2]
            message = f"given twice (first on line {first}); remove one"
            yield Problem(where, dotted(place), message)
        source[place] = where
        yield from _collect_lines(value, place, name, source)


def _apply_override(document: dict[str, Any], override: str, source: SourceMap) -> Problem | None:
    where = f"--set {override}"
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        return Problem(where, "", "write --set KEY=VALUE, like --set train.learning_rate=2e-4")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return Problem(where, key, f"the value {text!r} is not valid YAML; quote it")
    place: Location = ()
    parent: Any = document
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(parent, list):
            if not (part.isascii() and part.isdecimal()) or int(part) >= len(parent):
                return Problem(
                    where,
                    key,
                    f"'{dotted(place)}' is a list of {len(parent)}; "
                    f"'{part}' is not the index of one of its items (0 is the first)",
                )
            index: int | str = int(part)
        elif isinstance(parent, dict):
            index = part
        else:
            return Problem(where, key, f"'{dotted(place)}' is a value, not a section")
        place = (*place, index)
        if last:
            parent[index] = value
        else:
            if isinstance(parent, dict) and parent.get(part) is None:
                parent[part] = {}
            parent = parent[index]
    for end in range(1, len(place)):  # sections that begin here
        source.setdefault(place[:end], where)
    source[place] = where
    return None


def check_portable(loaded: LoadedSpec) -> None:
    """Reject a spec that names files or folders of this machine.

    Raises:
        SpecError: it does; holds all of them.
    """
    problems = [Problem(loaded.source, *part) for part in _local_parts(loaded.spec)]
    if problems:
        raise SpecError(problems)


def write_spec(spec: Spec, path: str) -> None:
    """Write the complete spec, with defaults and overrides, as YAML.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        Path(path).write_text(spec_text(spec), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def spec_text(spec: Spec) -> str:
    """Return the complete spec as YAML."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _local_parts(spec: Spec) -> Iterator[tuple[str, str]]:
    """Yield the path of each value that names a local file or folder, and what to write instead."""
    if not spec.output.startswith("gs://"):
        yield "output", f"{spec.output!r} is a local folder; write gs://bucket/prefix"
    preset = spec.model.preset
    if "://" not in preset and ("/" in preset or Path(preset).is_dir()):
        yield (
            "model.preset",
            f"{preset!r} is a local folder; name a preset on the Hub, hf://owner/name",
        )
    template = spec.model.chat_template
    if is_template_file(template):
        yield (
            "model.chat_template",
            f"{template!r} is a local file; put it into the model's repository as "
            "chat_template.jinja and write auto",
        )
    for path, source in spec.sources.items():
        if source.dataset != SAMPLES and not _is_remote(source.dataset):
            yield (
                f"{path}.dataset",
                f"{source.dataset!r} is a local file; copy it to a bucket "
                "(gcloud storage cp) and write gs://bucket/path",
            )
    for number, entry in enumerate(spec.evals.harness):
        if entry.include is not None:
            yield (
                f"evals.harness.{number}.include",
                f"{entry.include!r} is a local folder; build it into the image, or name a task of "
                "lm-evaluation-harness",
            )
    for number, task in enumerate(spec.evals.tasks):
        if task.function is not None:
            yield (
                f"evals.tasks.{number}.metric",
                f"{task.function[0]!r} is a local file; build it into the image, or write one of "
                f"{', '.join(METRICS)}",
            )
    adapter = spec.train.init_adapter
    if adapter is not None and not _is_remote(adapter):
        yield (
            "train.init_adapter",
            f"{adapter!r} is a local folder; copy it to a bucket and write gs://bucket/path",
        )


def _is_remote(uri: str) -> bool:
    return uri.startswith(("gs://", "hf://"))
