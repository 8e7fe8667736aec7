"""Loading a model: from a pinned Hub snapshot, a folder, a preset of KerasHub or of this job."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
from jax.sharding import Mesh

from job.chat.templates import PLAIN, choose_template
from job.chat.text_tokenizer import FastTokenizer, KerasTokenizer, TextTokenizer, read_json
from job.chat.tokenizer import ChatTokenizer
from job.errors import StageError, UsageError
from job.model.checkpoint_config import load_backbone
from job.model.language_model import LanguageModel, Preset
from job.model.sharding import loading_to_shards
from job.model.smollm2 import smollm2_preset
from job.model.tiny import tiny_preset
from job.runtime import logs
from job.spec.fields import SMOLLM2, TINY
from job.spec.pinning import NONE, Revisions, pinned
from job.spec.schema import Model
from job.storage.base import PARTIAL

_UNREADABLE = (".gguf", ".bin", ".pth", ".pt", ".onnx", ".msgpack", ".ot", ".tflite")
"""Suffixes of weights in formats that KerasHub does not read."""


def load_model(model: Model, seed: int, mesh: Mesh, revisions: Revisions = NONE) -> LanguageModel:
    """Load the spec's model, at the commit in `revisions` if that has one.

    Raises:
        UsageError: it cannot be loaded as a causal LM, or the spec does not fit it.
    """
    preset = resolve_preset(model, revisions)
    tokenizer = load_chat_tokenizer(model, preset)
    keras.utils.set_random_seed(seed)
    with loading_to_shards(mesh):
        logs.get().info("loading model", preset=preset.handle, dtype=model.dtype)
        task = load_task(preset.handle, model.dtype)
    loaded = LanguageModel(task, tokenizer, model, preset, mesh)
    if max(*tokenizer.stop_ids, tokenizer.pad_id) >= loaded.vocabulary:
        raise UsageError(
            f"model.preset: {model.preset}'s tokenizer has token ids outside the model's vocabulary"
        )
    logs.get().info(
        "model loaded",
        family=loaded.family,
        parameters=loaded.parameters,
        trainable=loaded.lora.parameters,
        chat_template=tokenizer.template.name,
        chat_template_source=tokenizer.template.source,
    )
    return loaded


def load_chat_tokenizer(model: Model, preset: Preset) -> ChatTokenizer:
    """Load the tokenizer and the chat template of the spec's model, without its weights.

    Raises:
        UsageError: they cannot be loaded, or do not fit each other.
    """
    folder = Path(preset.handle)
    tokenizer: TextTokenizer
    family = ""
    if (folder / "tokenizer.json").is_file() and "model_type" in read_json(folder / "config.json"):
        tokenizer = FastTokenizer(folder)
    else:
        hub_tokenizer = load_keras_tokenizer(preset)
        tokenizer, family = KerasTokenizer(hub_tokenizer), type(hub_tokenizer).__name__
    own = folder if folder.is_dir() else None
    template = choose_template(model.chat_template, model.preset, own, tokenizer, family)
    if template.name == PLAIN and "instruct" in template.source:
        logs.get().warning("the tokenizer has turn tokens", chat_template=template.source)
    if template.replaces_own:
        logs.get().warning("the model's own chat template is not used", chat_template=template.name)
    return ChatTokenizer(tokenizer, replace(template, kwargs=model.chat_template_kwargs))


def resolve_preset(model: Model, revisions: Revisions = NONE) -> Preset:
    """Resolve the spec's model to something KerasHub can load, downloading it if needed.

    KerasHub itself would fetch the files of a Hub repository one by one and without a revision.
    Here a snapshot at one commit is downloaded, and KerasHub gets the folder.

    Raises:
        UsageError: the model does not exist.
        SetupError: access to it is gated, or its packages are not installed.
        StageError: the Hub could not be reached.
    """
    if build := {TINY: tiny_preset, SMOLLM2: smollm2_preset}.get(model.preset):
        return Preset(str(build()), None)
    if model.preset.startswith("hf://"):
        return _snapshot(model, revisions)
    if Path(model.preset).is_dir():
        return Preset(str(Path(model.preset).absolute()), None)
    return Preset(model.preset, None)


def _snapshot(model: Model, revisions: Revisions) -> Preset:
    """Download the files of a commit into the cache and verify sizes and checksums."""
    repository, commit, folder = pinned("model", model.preset, model.revision, revisions, "models")
    files = [
        file
        for file in repository.files(commit)
        if not file.path.startswith(("original/", ".")) and not file.path.endswith(_UNREADABLE)
    ]
    repository.fetch(commit, files, folder)
    listed = {file.path for file in files}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        # Another process may be downloading what the commit lists.
        if not path.is_dir() and name not in listed and PARTIAL not in name:
            path.unlink(missing_ok=True)
    return Preset(str(folder), commit)


def load_keras_tokenizer(preset: Preset) -> Any:
    """Load KerasHub's tokenizer of a preset; errors as for `load_task`."""
    import keras_hub

    with _preset_errors(preset.handle):
        try:
            return keras_hub.tokenizers.Tokenizer.from_preset(preset.handle)
        except RuntimeError as error:  # of sentencepiece
            raise ValueError(error) from error


@contextmanager
def _preset_errors(name: str) -> Iterator[None]:
    from safetensors import SafetensorError

    wrong = AttributeError, ImportError, KeyError, RecursionError, TypeError, ValueError
    try:
        yield
    except (*wrong, SafetensorError) as error:
        reason = f"its config.json has no {error}" if isinstance(error, KeyError) else str(error)
        reason = reason.strip().partition("\n")[0]
        message = f"KerasHub cannot load {name!r} as a causal language model: {reason}"
        raise UsageError(f"model.preset: {message.partition(' A preset must')[0]}") from error
    except OSError as error:
        raise StageError(f"the files of {name!r} cannot be read: {error}") from error


def load_task(handle: str, dtype: str, name: str = "", *, load_weights: bool = True) -> Any:
    """Load the causal LM of a preset, without a preprocessor; messages call it `name`.

    Raises:
        UsageError: KerasHub cannot read it, or would not compute what its makers computed.
        StageError: its files cannot be read.
    """
    import keras_hub
    from keras_hub.src.utils.preset_utils import get_preset_loader
    from keras_hub.src.utils.transformers.preset_loader import TransformersPresetLoader

    name = name or handle
    with _preset_errors(name):
        loader = get_preset_loader(handle)
        # KerasHub picks the class by the backbone's, and two share Gemma 4's.
        is_gemma4 = loader.check_backbone_class() is keras_hub.models.Gemma4Backbone
        family = keras_hub.models.Gemma4CausalLM if is_gemma4 else keras_hub.models.CausalLM
        options: dict[str, Any] = {"dtype": dtype, "load_weights": load_weights}
        if isinstance(loader, TransformersPresetLoader):
            options = {"backbone": load_backbone(loader, name, dtype, load_weights=load_weights)}
        return family.from_preset(handle, preprocessor=None, **options)
