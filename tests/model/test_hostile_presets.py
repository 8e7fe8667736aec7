"""A preset's configuration becomes a model, or is refused: nothing that it names is run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from job.errors import JobError
from job.machine.devices import make_mesh
from job.model.load import load_model, resolve_preset
from job.spec.schema import Model, Runtime

ENTRY = {"module": "os", "class_name": "mkdir", "registered_name": None}


def call(folder: Path) -> dict[str, Any]:
    return ENTRY | {"config": {"path": str(folder)}}


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("config.json", "all"),
        ("config.json", "class"),
        ("config.json", "config"),
        ("tokenizer.json", "class"),
    ],
)
def test_a_preset_runs_nothing(file: str, place: str, tmp_path: Path) -> None:
    folder, made = tmp_path / "preset", tmp_path / "made"
    shutil.copytree(resolve_preset(Model(preset="tiny"), {}).handle, folder)
    document = json.loads((folder / file).read_text())
    if place == "all":
        document = call(made)
    elif place == "class":
        document |= {"module": "os", "class_name": "mkdir", "config": {"path": str(made)}}
    else:
        document["config"] = {key: call(made) for key in document["config"]}
    (folder / file).write_text(json.dumps(document))
    try:
        load_model(Model(preset=str(folder), dtype="float32"), 0, make_mesh(Runtime()))
    except JobError as refused:
        assert str(refused)
    assert not made.exists()
