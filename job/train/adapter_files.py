"""The adapter among the files of a run: what the train stage leaves, and the others read.

`adapter/adapter.lora.h5` for KerasHub, `adapter/peft/` for transformers, PEFT and vLLM, and
`adapter/adapter.json`, written last, which says what they are adapters of.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from job import logs
from job.errors import StageError, UsageError
from job.model.adapter import describe, load_adapter, save_adapter
from job.model.adapter_info import DESCRIPTION, H5, AdapterInfo, check_model, read_info
from job.model.factors import Matrix
from job.model.language_model import LanguageModel
from job.model.lora import LoraLayout, LoraWeights
from job.model.peft import PeftAdapter, peft_files
from job.run import Run
from job.spec import Model
from job.storage import file_sha256

FOLDER = "adapter/"
PEFT = "peft/"


def exportable(model: LanguageModel) -> tuple[Matrix, ...] | None:
    """What the adapted kernels are in transformers; None, with a warning, where nothing."""
    try:
        return model.matrices()
    except UsageError as error:
        logs.get().warning("the adapter will load in KerasHub only", reason=str(error))
        return None


def write_adapter(
    run: Run, model: LanguageModel, lora: LoraWeights, matrices: Sequence[Matrix] | None
) -> None:
    """Put a trained adapter into the run, in each format that its model has."""
    path = run.work / H5
    save_adapter(path, model.lora, lora)
    run.put_file(FOLDER + H5, path)
    files = {H5: file_sha256(path)}
    if matrices is not None:
        adapter = to_peft(model, run.spec.model, lora, matrices)
        for name, content in peft_files(adapter).items():
            run.put(f"{FOLDER}{PEFT}{name}", content)
            files[PEFT + name] = run.written[-1].sha256
    spec = run.spec.model
    info = describe(model.lora, model.family, spec.preset, model.preset.revision, files)
    run.put(FOLDER + DESCRIPTION, (info.model_dump_json(indent=2) + "\n").encode())


def to_peft(
    model: LanguageModel, spec: Model, lora: LoraWeights, matrices: Sequence[Matrix]
) -> PeftAdapter:
    """The same adapter by the names of the transformers model, exactly."""
    layout = model.lora
    return PeftAdapter(
        base=spec.preset.removeprefix("hf://"),
        revision=model.preset.revision,
        rank=layout.rank,
        dropout=spec.lora.dropout,
        modules={
            matrix.module: matrix.to_matrix(np.asarray(a), np.asarray(b), layout.scale)
            for matrix, (a, b) in zip(matrices, lora, strict=True)
        },
    )


def load_trained(run: Run, model: LanguageModel) -> tuple[LoraLayout, LoraWeights]:
    """The adapter of the run, from its file: what is used is what was saved.

    Raises:
        UsageError: it is of another model.
        StageError: a file is missing or damaged.
    """
    info = read_info(run.fetch(FOLDER + DESCRIPTION))
    check_model(info, run.spec.model.preset, model.family, FOLDER + DESCRIPTION)
    path = run.fetch(FOLDER + H5)
    check_file(info, H5, path)
    return load_adapter(path, model.lora)


def check_file(info: AdapterInfo, name: str, path: Path) -> None:
    """Raise StageError unless a file has the checksum that the description gives it."""
    if info.files.get(name) != file_sha256(path):
        raise StageError(
            f"{FOLDER}{name} does not have the checksum in {DESCRIPTION}: it is cut off or changed"
        )
