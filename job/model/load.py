"""Loading a model: from a pinned Hub snapshot, a folder, a preset of KerasHub or of this job."""

from pathlib import Path
from typing import Any

import keras
from jax.sharding import Mesh

from job.chat.tokenizer import ChatTokenizer
from job.errors import StageError, UsageError
from job.machine import devices
from job.model.language_model import LanguageModel, Preset
from job.model.sharding import loading_to_shards
from job.model.smollm2 import smollm2_preset
from job.model.tiny import tiny_preset
from job.runtime import logs
from job.spec.fields import SMOLLM2, TINY
from job.spec.pinning import NONE, Revisions, resolve_commit, revision_key
from job.spec.schema import Model
from job.storage.hub import SCHEME, Repository
from job.storage.locations import cache_folder


def load_model(model: Model, seed: int, mesh: Mesh, revisions: Revisions = NONE) -> LanguageModel:
    """Load the spec's model, at the commit in `revisions` if that has one.

    Raises:
        UsageError: it cannot be loaded as a causal LM, or the spec does not fit it.
    """
    preset = resolve_preset(model, revisions)
    keras.utils.set_random_seed(seed)
    with loading_to_shards(mesh):
        task, hub_tokenizer = load_keras_hub_task(preset, model.dtype)
    tokenizer = ChatTokenizer(hub_tokenizer, model.chat_template)
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
    )
    return loaded


def resolve_preset(model: Model, revisions: Revisions) -> Preset:
    """Resolve the spec's model to something KerasHub can load, downloading it if needed.

    KerasHub itself would fetch the files of a Hub repository one by one and without a revision.
    Here a snapshot at one commit is downloaded, and KerasHub gets the folder.

    Raises:
        UsageError: the model does not exist.
        SetupError: access to it is gated, or its packages are not installed.
        StageError: the Hub could not be reached.
    """
    devices.import_keras()
    if build := {TINY: tiny_preset, SMOLLM2: smollm2_preset}.get(model.preset):
        return Preset(str(build()), None)
    if model.preset.startswith("hf://"):
        return _snapshot(model, revisions)
    if Path(model.preset).is_dir():
        return Preset(str(Path(model.preset).absolute()), None)
    return Preset(model.preset, None)


def _snapshot(model: Model, revisions: Revisions) -> Preset:
    """Download the files of a commit into the cache and verify sizes and checksums."""
    name, revision = model.preset.removeprefix(SCHEME), model.revision
    key = revision_key("model", name, revision)
    commit = revisions.get(key) or resolve_commit("model", name, revision)
    repository = Repository("model", name, revision)
    files = [file for file in repository.files(commit) if _is_needed(file.path)]
    folder = cache_folder("models", name.replace("/", "--"), commit)
    repository.fetch(commit, files, folder)
    return Preset(str(folder), commit)


def _is_needed(path: str) -> bool:
    """Tell whether KerasHub may read a file; weights in other formats are skipped."""
    return not path.startswith(("original/", ".")) and not path.endswith(
        (".gguf", ".bin", ".pth", ".pt", ".onnx", ".msgpack", ".ot", ".tflite")
    )


def load_keras_hub_task(preset: Preset, dtype: str) -> tuple[Any, Any]:
    """Load the KerasHub causal LM (without a preprocessor) and its tokenizer.

    Raises:
        UsageError: the preset is not a causal language model that KerasHub can read.
        StageError: its files cannot be read.
    """
    import keras_hub

    logs.get().info("loading model", preset=preset.handle, dtype=dtype)
    try:
        task = task_class(preset.handle).from_preset(preset.handle, preprocessor=None, dtype=dtype)
        tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(preset.handle)
    except (ValueError, KeyError, ImportError) as error:
        raise UsageError(
            f"model.preset: KerasHub cannot load {preset.handle!r} as a causal language "
            f"model: {str(error).partition(' A preset must')[0]}"
        ) from error
    except OSError as error:
        raise StageError(f"the files of {preset.handle!r} cannot be read: {error}") from error
    return task, tokenizer


def task_class(handle: str) -> Any:
    """Return the class that loads the causal LM of a preset.

    KerasHub picks it by the backbone's class, and two classes share Gemma 4's: its pick is
    arbitrary.
    """
    import keras_hub
    from keras_hub.src.utils.preset_utils import get_preset_loader

    backbone = get_preset_loader(handle).check_backbone_class()
    if backbone is keras_hub.models.Gemma4Backbone:
        return keras_hub.models.Gemma4CausalLM
    return keras_hub.models.CausalLM
