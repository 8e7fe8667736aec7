"""`job export`: a run's adapter in PEFT's format, or the model with the adapter merged in."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from job.adapters.keras_format import CHAT_TEMPLATE, H5, check_model
from job.commands.trained_run import TrainedRun
from job.errors import StageError, UsageError
from job.runtime import logs


def export_run(
    uri: str,
    to: Literal["peft", "merged-keras", "merged-transformers"],
    folder: str,
    rank: Literal["exact", "uniform"] = "exact",
) -> None:
    """Write a run's adapter or merged model to a new folder.

    Args:
        uri: the run.
        to: the format.
        folder: the target folder; missing or empty.
        rank: for `peft`: whether its ranks may differ by layer.

    Raises:
        UsageError: the arguments are wrong, or the model has no such format.
        StageError: files of the run or the model are missing or damaged.
    """
    if rank != "exact" and to != "peft":
        raise UsageError("--rank applies to --to peft only; a merged model has no rank")
    logs.configure()
    with _new_folder(Path(folder)) as target, tempfile.TemporaryDirectory(prefix="job-") as work:
        source = TrainedRun(uri, Path(work), "job export")
        if to == "peft":
            _export_peft(source, target, rank)
        else:
            _export_merged(source, target, for_keras=to == "merged-keras")
            if CHAT_TEMPLATE in source.info.files:  # the one that training used
                shutil.copyfile(source.file(CHAT_TEMPLATE), target / CHAT_TEMPLATE)
    logs.get().info("exported", format=to, folder=str(Path(folder).absolute()))


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `folder` when the block succeeds."""
    if re.match(r"\w+:/", str(folder)):
        raise UsageError(f"{folder} is not a local folder; copy the export to a bucket afterwards")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} already exists; name a folder that is missing or empty")
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".job-export-", dir=folder.absolute().parent))
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        yield building
        building.chmod(0o755)
        building.replace(folder)
    except OSError as error:
        raise StageError(f"cannot write to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _export_peft(source: TrainedRun, target: Path, rank: str) -> None:
    from job.adapters.peft_format import peft_files, read_peft, uniform_rank

    folder = source.peft()
    adapter = read_peft(folder)
    if rank == "exact":
        for path in folder.iterdir():
            shutil.copyfile(path, target / path.name)
        ranks = sorted({factors.rank for factors in adapter.modules.values()})
        logs.get().info("exported at exact ranks", ranks=ranks)
        return
    adapter = uniform_rank(adapter)
    highest = max(factors.rank for factors in adapter.modules.values())
    logs.get().info("padded to a uniform rank", rank=highest)
    for name, content in peft_files(adapter).items():
        (target / name).write_bytes(content)


def _export_merged(source: TrainedRun, target: Path, *, for_keras: bool) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the model may not fit on an accelerator
    from job.adapters import merge
    from job.adapters.keras_format import load_adapter
    from job.adapters.peft_format import read_peft
    from job.model.abstract import make_task
    from job.model.load import load_keras_tokenizer, load_task, resolve_preset
    from job.model.lora import make_lora_layout

    spec, info = source.spec, source.info
    preset = resolve_preset(spec.model, source.revisions)
    folder = Path(preset.handle)
    if not for_keras and folder.is_dir() and merge.is_checkpoint(folder):
        merge.merge_checkpoint(folder, read_peft(source.peft()), target)
        make_task(spec.model, json.loads((target / "config.json").read_bytes()))
        return
    path = source.file(H5)
    task, tokenizer = load_task(preset.handle, spec.model.dtype), load_keras_tokenizer(preset)
    check_model(info, spec.model.preset, type(task.backbone).__name__, "job export")
    layout, lora = load_adapter(path, make_lora_layout(task.backbone, spec.model.lora))
    merge.merge_in_place(task.backbone, layout, lora)
    if for_keras:
        merge.write_preset(task, tokenizer, target)
    else:
        merge.write_checkpoint(task.backbone, tokenizer, target)
    merge.check_export(task.backbone, target, spec.model.dtype)
