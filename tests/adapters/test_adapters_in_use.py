"""From `job run` to where an adapter is used: the commands, transformers and PEFT.

The model is a sharded transformers checkpoint in a folder, like a Hub snapshot. Transformers and
PEFT must compute from the exports what the run's own adapter file gives.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import Mesh

from job.adapters.keras_format import load_adapter
from job.model.load import load_model
from job.model.tiny import VOCABULARY, train_tokenizer
from job.spec.schema import Lora, Model
from tests.command import job
from tests.model.forward import full_logits
from tests.peers import run_peer

pytestmark = pytest.mark.slow
LORA = {"rank": 4, "alpha": 8, "targets": ["query", "value", "ffw_linear"]}
PROMPTS = [list(range(20, 20 + length)) for length in (1, 8, 9, 60)]


def write_spec(path: Path, model: Path, **train: object) -> str:
    spec = {
        "name": "t",
        "output": str(path.parent / "runs"),
        "model": {"preset": str(model), "dtype": "float32", "lora": LORA},
        "data": {
            "dataset": "samples", "prompt": "{input}", "response": "{output}",
            "train_examples": 32, "validation_examples": 8,
        },
        "train": {
            "batch_size": 8, "max_length": 128, "packing": False, "buckets": 1, "remat": "none",
            "optimizer": "sgd", "learning_rate": 0.2, "clip_norm": None,
        } | train,
        "evals": {"dialogue": None, "side_by_side": {"examples": 0}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(spec))
    return str(path)


def outcome(run: Path) -> dict[str, float]:
    record = json.loads((run / "stages/train.json").read_text())
    return dict(record["outcome"]["training"]["loss"])


def test_a_runs_adapter_is_the_same_model_everywhere(tmp_path: Path) -> None:
    run_peer("make_models.py", tmp_path, VOCABULARY, "gemma3")
    model, runs = tmp_path / "gemma3", tmp_path / "runs"
    (model / "tokenizer.model").write_bytes(train_tokenizer())

    def succeed(*arguments: str) -> None:
        done = job(*arguments)
        assert done.code == 0, done.err

    first = write_spec(tmp_path / "first.yaml", model)
    succeed("run", first, "--run-id", "first", "--until", "train")
    second = write_spec(
        tmp_path / "second.yaml", model, init_adapter=str(runs / "first/adapter/peft")
    )
    succeed("run", second, "--run-id", "second", "--until", "train")
    one, two = outcome(runs / "first"), outcome(runs / "second")
    assert abs(one["validation_after"] - one["validation_before"]) > 1e-3
    assert two["validation_before"] == pytest.approx(one["validation_after"], abs=1e-5)

    for to in ("peft", "merged-transformers"):
        succeed("export", str(runs / "second"), str(tmp_path / to), "--to", to)
    copied = {path.name for path in model.iterdir()} | {"chat_template.jinja"}
    assert {path.name for path in (tmp_path / "merged-transformers").iterdir()} == copied

    spec = Model(preset=str(model), dtype="float32", lora=Lora.model_validate(LORA))
    ours = load_model(spec, 0, Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model")))
    adapter = load_adapter(runs / "second/adapter/adapter.lora.h5", ours.lora)
    weights = ours.merged_weights(*adapter)
    requests = [
        {"model": str(base), "adapter": adapter and str(tmp_path / adapter), "merge": False,
         "prompts": PROMPTS, "out": str(tmp_path / f"{name}.npz")}
        for name, base, adapter in (
            ("peft", model, "peft"), ("merged", tmp_path / "merged-transformers", None),
            ("base", model, None),
        )
    ]  # fmt: skip
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    run_peer("logits.py", tmp_path / "requests.json")
    answers = {name: np.load(tmp_path / f"{name}.npz") for name in ("peft", "merged", "base")}
    for number, prompt in enumerate(PROMPTS):
        tokens = np.array([prompt], np.int32)
        expected = full_logits(ours, weights, tokens)[0]
        theirs = {name: arrays[str(number)] for name, arrays in answers.items()}
        assert np.abs(theirs.pop("base") - expected).max() > 0.05
        for name, logits in theirs.items():
            np.testing.assert_allclose(logits, expected, atol=1e-4, err_msg=name)
