"""From YAML text to a checked `Spec`, or to every problem at once with its path and line.

A spec is found by path, by gs:// URI, or by the name of a shipped one. `--set a.b=c`
replaces a value before checking, and a problem in it is reported at the flag rather than
at a line. There is no interpolation of any kind: what a spec says is what it means.
"""

import difflib
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from job.errors import Problem, SpecError, UsageError
from job.runtime.logs import TOKEN_SHAPES
from job.spec.fields import SAMPLES
from job.spec.schema import Spec

Location = tuple[str | int, ...]


Lines = dict[Location, int]


@dataclass(frozen=True)
class LoadedSpec:
    """A checked spec and the name it was found under."""

    spec: Spec
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of the spec's canonical JSON, in hex."""
        return digest(self.spec.model_dump(mode="json"))


def digest(value: object) -> str:
    """SHA-256, in hex, of `value` as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def run_id(spec: Spec) -> str:
    """The default run id: the name and a digest of what the adapter is a function of.

    Evaluations are left out on purpose: changing what is measured goes on in the same run,
    where the training that is being measured lies.
    """
    parts = spec.model_dump(mode="json", include={"name", "seed", "model", "data", "train"})
    return f"{spec.name}-{digest(parts)[:10]}"


def shipped_specs() -> list[str]:
    """Names of the specs in the package."""
    folder = resources.files("job") / "specs"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_source(source: str) -> tuple[str, str]:
    """The text of a spec and the name to report problems under.

    What JOB_SPEC holds may be the text itself: it has a line break, or begins as JSON does.

    Raises:
        UsageError: nothing is found under that name, path or URI.
    """
    if source == os.environ.get("JOB_SPEC") and re.search(r"\n|^\s*\{", source):
        return source, "JOB_SPEC"
    if source.startswith("gs://"):
        from job.storage.locations import read_uri

        return read_uri(source).decode("utf-8", errors="replace"), source
    path = Path(source)
    if _is_file(path):
        try:
            return path.read_text(encoding="utf-8"), source
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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name no file can have
        return False


def load_spec(source: str, overrides: Sequence[str] = ()) -> LoadedSpec:
    """Read, override and check a spec.

    Raises:
        UsageError: the spec is not found.
        SpecError: it is wrong; holds all problems.
    """
    text, name = read_source(source)
    return LoadedSpec(parse_spec(text, name, overrides), name)


def parse_spec(text: str, name: str, overrides: Sequence[str] = ()) -> Spec:
    """Check the YAML `text` of a spec, called `name` in messages."""
    document, lines, problems = _parse_yaml(text, name)
    flags: dict[Location, str] = {}
    for override in overrides:
        problem = _apply_override(document, override, flags)
        if problem:
            problems.append(problem)
    try:
        problems += _forbidden_text(document, (), name, lines, flags)
        spec = Spec.model_validate(document)
    except ValidationError as error:
        found = _merged([_translate(item, name, lines, flags) for item in error.errors()])
        named = {problem.path for problem in problems}
        problems += [problem for problem in found if problem.path not in named]
    except RecursionError:
        problems.append(Problem(name, "", "not valid YAML: a value holds itself"))
    else:
        if not problems:
            return spec
    raise SpecError(_in_order(problems))


def _parse_yaml(text: str, name: str) -> tuple[dict[str, Any], Lines, list[Problem]]:
    lines: Lines = {}
    problems: list[Problem] = []
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
        if root is not None:
            _collect_lines(root, (), lines, problems, name)
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
        found = "an empty file" if document is None else f"a {type(document).__name__}"
        message = f"a spec is a mapping of sections (name, model, data, ...), but this is {found}"
        raise SpecError([Problem(f"{name}:1", "", message)])
    return document, lines, problems


def _collect_lines(
    node: yaml.Node, at: Location, lines: Lines, problems: list[Problem], name: str
) -> None:
    """Record the line of every key and item, and the keys that are given twice."""
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*at, str(key.value))
            line = key.start_mark.line + 1
            if place in lines:
                message = f"given twice (first on line {lines[place]}); keep one"
                problems.append(Problem(f"{name}:{line}", _dotted(place), message))
            lines[place] = line
            _collect_lines(value, place, lines, problems, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            place = (*at, index)
            lines[place] = value.start_mark.line + 1
            _collect_lines(value, place, lines, problems, name)


def _apply_override(
    document: dict[str, Any], override: str, flags: dict[Location, str]
) -> Problem | None:
    where = f"--set {override}"
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        return Problem(where, "", "write --set KEY=VALUE, like --set train.learning_rate=2e-4")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return Problem(where, key, f"the value {text!r} is not valid YAML; quote it")
    place: Location = ()
    holder: Any = document
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(holder, list):
            if not (part.isascii() and part.isdecimal()) or int(part) >= len(holder):
                return Problem(
                    where,
                    key,
                    f"'{_dotted(place)}' is a list of {len(holder)}; "
                    f"'{part}' is not the number of one of its items (0 is the first)",
                )
            index: int | str = int(part)
        elif isinstance(holder, dict):
            index = part
        else:
            return Problem(where, key, f"'{_dotted(place)}' is a value, not a section")
        place = (*place, index)
        if last:
            holder[index] = value
        else:
            if isinstance(holder, dict) and holder.get(part) is None:
                holder[part] = {}
            holder = holder[index]
    flags[place] = where
    return None


def _forbidden_text(
    value: object, at: Location, name: str, lines: Lines, flags: dict[Location, str]
) -> list[Problem]:
    if isinstance(value, dict):
        children: list[tuple[str | int, object]] = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    elif isinstance(value, str) and TOKEN_SHAPES.search(value):
        message = "looks like a secret; secrets come from the environment alone (HF_TOKEN, ...)"
        return [Problem(_where(at, name, lines, flags), _dotted(at), message)]
    elif isinstance(value, str) and "${" in value:
        message = f"{value!r} holds ${{...}}, which is not filled in; write the value, or use --set"
        return [Problem(_where(at, name, lines, flags), _dotted(at), message)]
    else:
        return []
    return [
        problem
        for key, child in children
        for problem in _forbidden_text(child, (*at, key), name, lines, flags)
    ]


def _translate(error: ErrorDetails, name: str, lines: Lines, flags: dict[Location, str]) -> Problem:
    at = _known_prefix(error["loc"], lines, flags)
    kind = error["type"]
    value = error["input"]
    if kind == "missing":
        place = (*at, error["loc"][-1]) if at != error["loc"] else at
        return Problem(_where(at, name, lines, flags), _dotted(place), "required, but missing")
    if kind == "extra_forbidden":
        message = "unknown key"
        known = _keys_at(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1)
        if near:
            message += f"; did you mean '{near[0]}'?"
        elif known:
            message += f"; known here: {', '.join(known)}"
    elif kind == "value_error":
        message = str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
        # A check of several fields begins with the one to change.
        if first := re.match(r"`([\w.]+)`", message):
            parts = (int(part) if part.isdecimal() else part for part in first[1].split("."))
            at = (*at, *parts)
    elif kind == "string_pattern_mismatch":
        message = (
            f"{value!r} may hold lower case letters, digits, '.', '_' and '-' only, "
            "and begins and ends with a letter or digit"
        )
    elif isinstance(value, dict | list) and len(str(value)) > 60:
        message = f"{error['msg'].lower()} (got a {type(value).__name__})"
    else:
        message = f"{error['msg'].replace('Input should', 'should')} (got {value!r})"
    return Problem(_where(at, name, lines, flags), _dotted(at), message)


def _merged(problems: list[Problem]) -> list[Problem]:
    """One problem a place: a field of several types fails once for each of them."""
    merged: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        messages = merged.setdefault((problem.where, problem.path), [])
        message = problem.message
        if messages:
            message = message.partition(" (got ")[0]
        if message not in messages:
            messages.append(message)
    return [Problem(*place, ", or ".join(messages)) for place, messages in merged.items()]


def _known_prefix(location: Location, lines: Lines, flags: dict[Location, str]) -> Location:
    """The part of a pydantic location that the document has: union tags name no place in it."""
    at = location
    while at and at not in lines and at not in flags:
        if any(place[: len(at)] == at for place in flags):
            break
        at = at[:-1]
    return at


def _where(at: Location, name: str, lines: Lines, flags: dict[Location, str]) -> str:
    for end in range(len(at), 0, -1):
        if at[:end] in flags:
            return flags[at[:end]]
        if at[:end] in lines:
            return f"{name}:{lines[at[:end]]}"
        for place, flag in flags.items():
            if place[:end] == at[:end]:
                return flag
    return f"{name}:{lines.get((), 1)}"


def _keys_at(location: Location) -> list[str]:
    """Names of the fields of the model at a place of the spec."""
    model: Any = Spec
    for part in location:
        if isinstance(part, int):
            continue
        fields = getattr(model, "model_fields", {})
        if part in fields:
            model = _section_of(fields[part].annotation)
    return sorted(getattr(model, "model_fields", {}))


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            found = _section_of(argument)
            if found:
                return found
    return None


def _dotted(at: Location) -> str:
    return ".".join(str(part) for part in at)


def _in_order(problems: list[Problem]) -> list[Problem]:
    """One problem a place and message, in the order of the file, flags last."""

    def position(problem: Problem) -> tuple[int, int]:
        line = problem.where.rsplit(":", 1)[-1]
        return (
            (0, int(line)) if line.isdigit() and not problem.where.startswith("--set") else (1, 0)
        )

    return sorted(dict.fromkeys(problems), key=position)


def check_portable(loaded: LoadedSpec) -> None:
    """Refuse a spec that names files or folders of this machine.

    Raises:
        SpecError: it does; holds every place.
    """
    problems = [Problem(loaded.source, *found) for found in _local_parts(loaded.spec)]
    if problems:
        raise SpecError(problems)


def write_spec(spec: Spec, path: str) -> None:
    """Write the whole spec, with its defaults and all that was set, as YAML.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        Path(path).write_text(spec_text(spec), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def spec_text(spec: Spec) -> str:
    """The whole spec as YAML."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _local_parts(spec: Spec) -> Iterator[tuple[str, str]]:
    """The paths of values that name something of this machine, each with what to do."""
    if not spec.output.startswith("gs://"):
        yield "output", f"{spec.output!r} is a folder of one machine; write gs://bucket/prefix"
    preset = spec.model.preset
    if "://" not in preset and ("/" in preset or Path(preset).is_dir()):
        yield (
            "model.preset",
            f"{preset!r} is a folder of this machine; name a preset of the Hub, hf://owner/name",
        )
    datasets = {"data.dataset": spec.data.dataset}
    for index, item in enumerate(spec.evals.multiple_choice):
        datasets[f"evals.multiple_choice.{index}.dataset"] = item.dataset
    for path, dataset in datasets.items():
        if dataset != SAMPLES and not _is_remote(dataset):
            yield (
                path,
                f"{dataset!r} is a file of this machine; copy it into a bucket "
                "(gcloud storage cp) and write gs://bucket/path",
            )
    adapter = spec.train.init_adapter
    if adapter is not None and not _is_remote(adapter):
        yield (
            "train.init_adapter",
            f"{adapter!r} is a folder of this machine; copy it into a bucket and write "
            "gs://bucket/path",
        )


def _is_remote(uri: str) -> bool:
    return uri.startswith(("gs://", "hf://"))
