"""The chat template of a model: its own, a built-in one, or a file; `renderer` runs it."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from job.chat.text_tokenizer import TextTokenizer, read_json
from job.errors import UsageError
from job.spec.fields import TINY, is_template_file

AUTO, PLAIN = "auto", "plain"
OWN = "own"
"""Name of a template that comes with the model."""

BUILT_IN = ("gemma", "gemma4", "llama3", "chatml", "mistral", PLAIN)

_TURN_TOKENS = {
    "gemma4": ("<|turn>", "<turn|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
"""The special tokens that a built-in template needs."""

_START = "{{ bos_token }}\n"

_INSTRUCT = re.compile(r"(?i)(?:^|[-_.])(?:instruct|it|chat)(?:[-_.]|$)")
"""Names of presets tuned to follow instructions; pretrained ones have no chat template."""


@dataclass(frozen=True)
class ChatTemplate:
    """The text of a chat template, and where it is from."""

    name: str
    """`own`, the name of a built-in one, or the path of a file."""
    source: str
    """Where it is from, for people."""
    text: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for it, such as `enable_thinking`."""
    replaces_own: bool = False
    """True if the model's files carry another one."""

    @property
    def sha256(self) -> str:
        """The checksum of the text and the variables."""
        variables = json.dumps(dict(self.kwargs), sort_keys=True) if self.kwargs else ""
        return hashlib.sha256((self.text + variables).encode()).hexdigest()


def built_in(name: str, *, starts: bool = True) -> ChatTemplate:
    """Return a built-in template, without a start token for a tokenizer that puts none first."""
    path = resources.files("job") / "chat" / "builtin" / f"{name}.jinja"
    text = path.read_text("utf-8")
    return ChatTemplate(name, "built in", text if starts else text.replace(_START, ""))


def own_templates(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the templates in a model's folder: text and file by name; `default` is the main one.

    Raises:
        UsageError: a file cannot be read.
    """
    found: dict[str, tuple[str, str]] = {}
    for file in ("tokenizer_config.json", "chat_template.json"):
        value = read_json(folder / file).get("chat_template")
        named = {"default": value} if isinstance(value, str) else {}
        if isinstance(value, list):
            entries = [entry for entry in value if isinstance(entry, dict)]
            named = {str(entry.get("name")): str(entry.get("template")) for entry in entries}
        found |= {name: (text, file) for name, text in named.items() if isinstance(text, str)}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in folder.glob("additional_chat_templates/*.jinja")}
    for name, path in files.items():
        if path.is_file():
            found[name] = _read(path), path.name
    return found


def choose_template(
    name: str, preset: str, folder: Path | None, tokenizer: TextTokenizer, family: str = ""
) -> ChatTemplate:
    """Return the chat template that the spec names.

    Args:
        name: `auto`, a built-in one, one of several of the model, or a file.
        preset: of the spec.
        folder: the model's files, where it has a folder.
        tokenizer: the model's.
        family: the class name of KerasHub's tokenizer, if that is used.

    Raises:
        UsageError: there is no such template, or it does not fit the tokenizer.
    """
    own = own_templates(folder) if folder else {}
    starts = tokenizer.start_id is not None
    if name == AUTO:
        if "default" in own:
            text, file = own["default"]
            return ChatTemplate(OWN, f"{file} of the model", text)
        if own:
            raise UsageError(
                "model.chat_template: the model has several templates and none is the default; "
                f"write one of {', '.join(own)}"
            )
        return _auto(preset, tokenizer, family)
    if name in BUILT_IN:
        missing = [t for t in _TURN_TOKENS.get(name, ()) if t not in tokenizer.special_ids]
        if missing:
            raise UsageError(
                f"model.chat_template: {name} needs the tokens {', '.join(missing)}, which this "
                "model's tokenizer does not have; use plain or auto"
            )
        template = built_in(name, starts=starts)
        replaces_own = "default" in own and own["default"][0] != template.text
        return ChatTemplate(name, template.source, template.text, replaces_own=replaces_own)
    if name in own:
        text, file = own[name]
        return ChatTemplate(OWN, f"'{name}' in {file} of the model", text)
    if is_template_file(name):
        return ChatTemplate(name, f"the file {Path(name).name}", _read(Path(name)))
    others = f", {', '.join(own)} (the model's)" if len(own) > 1 else ""
    raise UsageError(
        f"model.chat_template: there is no template {name!r}; write auto, "
        f"{', '.join(BUILT_IN)}{others}, or the path of a file NAME.jinja"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"model.chat_template: {str(path)!r} cannot be read: {reason}") from error


_DOUBTFUL = "built in; if this is an instruct model, set model.chat_template: {}"


def _is_instruct(preset: str) -> bool:
    """Return whether the last part of a preset's name says that it follows instructions."""
    return preset == TINY or bool(_INSTRUCT.search(preset.rstrip("/").rpartition("/")[2]))


def _auto(preset: str, tokenizer: TextTokenizer, family: str) -> ChatTemplate:
    """Return the template of a model that carries none."""
    fitting = [n for n, tokens in _TURN_TOKENS.items() if tokenizer.special_ids.keys() >= {*tokens}]
    starts = tokenizer.start_id is not None
    if not _is_instruct(preset):
        plain = built_in(PLAIN, starts=starts)
        return replace(plain, source=_DOUBTFUL.format(fitting[0])) if fitting else plain
    if fitting:
        return built_in(fitting[0], starts=starts)
    if family.startswith(("Mistral", "Mixtral")):
        return built_in("mistral", starts=starts)
    raise UsageError(
        f"model.chat_template: {preset} is an instruct model, but its files have no chat template "
        f"and its special tokens are none that are known; write {', '.join(BUILT_IN)}, or the path "
        "of a Jinja file"
    )


def planned_template(name: str, preset: str) -> str:
    """Return what is known of the chat template before the model is loaded, for people."""
    if name != AUTO:
        return name
    folder = Path(preset)
    if folder.is_dir() and "default" in (own := own_templates(folder)):
        return f"own ({own['default'][1]} of the model)"
    otherwise = "the built-in one of its turn tokens" if _is_instruct(preset) else PLAIN
    return f"the model's own, else {otherwise}"
