"""`job export`: what it writes is the fine-tuned model; wrong input ends in one clear error."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import jax
import keras_hub
import numpy as np
import pytest
import yaml

from job import cli
from job.adapters.hf_weight_map import target_matrices
from job.adapters.keras_format import load_adapter
from job.adapters.locate import find_adapter
from job.adapters.peft_format import read_peft
from job.commands.export import export_run
from job.errors import StageError, UsageError
from job.model.language_model import LanguageModel
from job.pipeline.run import Run
from job.pipeline.train_stage import write_adapter
from job.storage.local import LocalStore
from job.storage.locations import open_store
from tests.adapters.test_warm_start import make_run, trained
from tests.conftest import MakeModel
from tests.model.forward import full_logits
from tests.services.bucket import Bucket
from tests.services.hub import Hub
from tests.test_cli import job

TOKENS = np.arange(20, 110, dtype=np.int32)[None]


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> LanguageModel:
    return make_model(preset="tiny", rank=4, alpha=8)


def leave(folder: Path, model: LanguageModel, **model_spec: str) -> Run:
    """A run whose training is done."""
    run = make_run(folder, model, **model_spec)
    run.work.mkdir(parents=True)
    run.put("spec.yaml", yaml.safe_dump(run.spec.model_dump(mode="json")).encode())
    write_adapter(run, model, trained(model), target_matrices(model.backbone, model.lora))
    return run


@pytest.fixture
def run(tmp_path: Path, model: LanguageModel) -> Path:
    leave(tmp_path / "run", model)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def tuned(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Logits of the adapter's file."""
    folder = tmp_path_factory.mktemp("tuned")
    leave(folder, model)
    weights = model.merged_weights(*load_adapter(folder / "adapter/adapter.lora.h5", model.lora))
    return full_logits(model, weights, TOKENS)


def test_description_says_what_the_adapter_is_of(run: Path) -> None:
    said = json.loads((run / "adapter/adapter.json").read_text())
    assert (said["preset"], said["family"]) == ("tiny", "Gemma3Backbone")
    assert (said["rank"], said["alpha"], said["targets"]) == (4, 8.0, ["query", "value"])
    assert len(said["layers"]) == 12
    assert said["layers"][1]["kernel"] == [4, 64, 32]
    assert set(said["files"]) == {
        "adapter.lora.h5", "chat_template.jinja", "peft/adapter_config.json",
        "peft/adapter_model.safetensors",
    }  # fmt: skip


def test_peft_adapter_is_the_runs_own_to_the_byte(run: Path, tmp_path: Path) -> None:
    export_run(str(run), "peft", str(tmp_path / "out"), "exact")
    there = {path.name: path.read_bytes() for path in (run / "adapter/peft").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == there


def test_run_in_a_bucket_is_exported_and_gone_on_from(
    run: Path, tmp_path: Path, bucket: Bucket
) -> None:
    local, store = LocalStore(run), open_store("gs://runs/team/doctor")
    for key in local.list():
        store.write(key, local.read(key) or b"")
    export_run(store.uri, "peft", str(tmp_path / "out"), "exact")
    there = find_adapter(store.uri, "init_adapter", "adapter/").digests()
    assert there == find_adapter(str(run), "init_adapter", "adapter/").digests()
    assert len(list((tmp_path / "out").iterdir())) == 2
    with pytest.raises(UsageError, match="is not a local folder"):
        export_run(str(run), "peft", "gs://runs/out", "exact")


def test_adapter_on_the_hub_is_read_at_its_commit(run: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in (run / "adapter/peft").iterdir()}
    script = (
        "import sys; from pathlib import Path; from job.adapters.locate import find_adapter\n"
        "known = {'model:clinic/adapter@': sys.argv[1]}\n"
        "files = find_adapter('hf://clinic/adapter', 'init_adapter', revisions=known)\n"
        "print(files.kind, files.fetch(Path(sys.argv[2])))"
    )
    with Hub("hf_token") as hub:
        commit = hub.add_repo("models", "clinic/adapter", files)
        hub.add_repo("models", "clinic/adapter", {"README.md": b"moved on"})
        done = subprocess.run(
            [sys.executable, "-c", script, commit, str(tmp_path / "out")],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stdout.split()[-2:] == ["peft", str(tmp_path / "out")], done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


def test_a_uniform_rank_is_exact(run: Path, tmp_path: Path) -> None:
    exact = read_peft(run / "adapter/peft").modules
    export_run(str(run), "peft", str(tmp_path / "uniform"), "uniform")
    for name, factors in read_peft(tmp_path / "uniform").modules.items():
        assert factors.rank == 16
        np.testing.assert_allclose(factors.delta(), exact[name].delta(), atol=1e-6)


@pytest.mark.parametrize("to", ["merged-keras", "merged-transformers"])
def test_merged_folders_load_as_the_tuned_model(
    run: Path, tmp_path: Path, tuned: np.ndarray, to: Literal["merged-keras", "merged-transformers"]
) -> None:
    export_run(str(run), to, str(tmp_path / "out"), "exact")
    task = keras_hub.models.CausalLM.from_preset(
        str(tmp_path / "out"), preprocessor=None, dtype="float32"
    )
    inputs = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    logits = np.asarray(jax.jit(task)(inputs))
    np.testing.assert_allclose(logits, tuned, atol=1e-5)
    tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(str(tmp_path / "out"))
    assert tokenizer("<start_of_turn>user") is not None


def test_large_checkpoints_are_written_in_shards(
    run: Path, tmp_path: Path, tuned: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.adapters.merge.SHARD_BYTES", 600_000)
    export_run(str(run), "merged-transformers", str(tmp_path / "out"), "exact")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    backbone = keras_hub.models.Backbone.from_preset(str(tmp_path / "out"), dtype="float32")
    hidden = jax.jit(backbone)({"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)})
    logits = np.asarray(backbone.token_embedding(hidden, reverse=True))
    np.testing.assert_allclose(logits, tuned, atol=1e-5)


@pytest.mark.parametrize(
    ("to", "rank", "words"),
    [
        ("onnx", "exact", ["'--to'", "onnx", "peft", "merged-keras", "merged-transformers"]),
        ("peft", "0", ["'--rank'", "0", "exact", "uniform"]),
        ("merged-keras", "uniform", ["--rank applies to --to peft only"]),
    ],
)
def test_wrong_arguments_are_told(
    run: Path, tmp_path: Path, to: str, rank: str, words: list[str]
) -> None:
    done = job("export", str(run), str(tmp_path / "out"), "--to", to, "--rank", rank)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr


def test_a_folder_in_use_and_a_folder_that_is_no_run_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="already exists"):
        export_run(str(run), "peft", str(tmp_path / "mine"), "exact")
    for folder in (tmp_path / "mine", run / "adapter"):
        with pytest.raises(UsageError, match="has no adapter|is not a run"):
            export_run(str(folder), "peft", str(tmp_path / "out"), "exact")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]


@pytest.mark.parametrize(
    ("to", "name"),
    [("peft", "peft/adapter_model.safetensors"), ("merged-keras", "adapter.lora.h5")],
)
def test_truncated_file_leaves_nothing_and_ends_with_4(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    to: str,
    name: str,
) -> None:
    path = run / "adapter" / name
    path.write_bytes(path.read_bytes()[:-100])
    arguments = ["job", "export", str(run), str(tmp_path / "out"), "--to", to]
    monkeypatch.setattr(sys, "argv", arguments)
    assert cli.main() == 4
    assert f"adapter/{name} does not have the checksum in adapter.json" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_adapter_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    path = run / "adapter/adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preset": "gemma3_1b"}))
    with pytest.raises(UsageError, match=r"trained on gemma3_1b .* but the model is tiny"):
        export_run(str(run), "merged-keras", str(tmp_path / "out"), "exact")


def test_adapter_of_another_rank_is_refused(run: Path, tmp_path: Path) -> None:
    path = run / "spec.yaml"
    path.write_text(path.read_text().replace("rank: 4", "rank: 2"))
    with pytest.raises(StageError, match="has rank 4, but model.lora.rank is 2"):
        export_run(str(run), "merged-keras", str(tmp_path / "out"), "exact")
