"""Adapters in PEFT's format: exact both ways, at any rank; more than LoRA is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from structlog.testing import capture_logs

from job.adapters.hf_weight_map import target_matrices
from job.adapters.low_rank import LinearMatrix, LowRankUpdate, pad_rank
from job.adapters.peft_format import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PeftAdapter,
    base_name,
    peft_files,
    read_peft,
    uniform_rank,
)
from job.errors import StageError, UsageError
from job.model.language_model import LanguageModel

ATTENTION = LinearMatrix("model.layers.0.self_attn.q_proj", (3, 8, 5), (0, 2), (1,))
LAYOUTS = [
    ATTENTION,
    LinearMatrix("q", (8, 3, 5), (1, 2), (0,)),  # Llama's: hidden first
    LinearMatrix("o", (3, 5, 8), (2,), (0, 1)),  # heads on the input's side
    LinearMatrix("turned", (3, 8, 5), (2, 0), (1,)),  # heads after their width
    LinearMatrix("mlp", (8, 6), (1,), (0,)),
]


def kernel_factors(matrix: LinearMatrix, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    *front, last = matrix.kernel_shape
    a = generator.normal(size=(*front, rank)).astype(np.float32)
    return a, generator.normal(size=(rank, last)).astype(np.float32)


def adapter(rank: int = 2, scale: float = 1.5) -> PeftAdapter:
    """Two layers' attention and feed-forward."""
    modules = {}
    for layer in range(2):
        query, up = ATTENTION, LinearMatrix("", (8, 6), (1,), (0,))
        modules[f"model.layers.{layer}.self_attn.q_proj"] = query.matrix_update(
            *kernel_factors(query, rank, layer), scale
        )
        modules[f"model.layers.{layer}.mlp.up_proj"] = up.matrix_update(
            *kernel_factors(up, rank, layer + 7), scale
        )
    return PeftAdapter("google/gemma", "abc", rank, 0.1, modules)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("recorded", "name"),
    [
        ('{"_name_or_path": "owner/model-1.5"}', "owner/model-1.5"),
        ('{"_name_or_path": "/home/me/model"}', "mine"),
        ('{"_name_or_path": "../owner/model"}', "mine"),
        ('{"_name_or_path": "a/b/c"}', "mine"),
        ('{"_name_or_path": ""}', "mine"),
        ('{"model_type": "llama"}', "mine"),
        ("[]", "mine"),
        ("{", "mine"),
        (None, "mine"),
    ],
)
def test_a_base_is_never_a_local_path(recorded: str | None, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    if recorded is not None:
        (folder / "config.json").write_text(recorded)
    with capture_logs() as log:
        assert base_name(f"{folder}/") == name
    assert [event["name"] for event in log] == ["mine"] * (name == "mine")


@pytest.mark.parametrize(
    ("preset", "name"),
    [("hf://owner/model", "owner/model"), ("gemma3_1b", "gemma3_1b"), ("tiny", "tiny")],
)
def test_a_base_that_is_no_folder_has_its_own_name(preset: str, name: str) -> None:
    with capture_logs() as log:
        assert base_name(preset) == name
    assert log == []


def changed(folder: Path, **values: Any) -> Path:
    path = write(folder, peft_files(adapter())) / PEFT_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize("matrix", LAYOUTS, ids=lambda matrix: matrix.module)
@given(rank=st.integers(1, 4), seed=st.integers(0, 9))
def test_conversion_to_peft_and_back_is_exact(matrix: LinearMatrix, rank: int, seed: int) -> None:
    a, b = kernel_factors(matrix, rank, seed)
    there = matrix.matrix_update(a, b, 0.5)
    np.testing.assert_allclose(there.delta(), matrix.from_kernel(0.5 * (a @ b)), atol=1e-5)
    for factors in (there, pad_rank(there, there.rank + 3)):
        back_a, back_b = matrix.kernel_factors(factors)
        np.testing.assert_array_equal(back_a, a)
        np.testing.assert_array_equal(back_b, b)


@pytest.mark.parametrize("matrix", LAYOUTS, ids=lambda matrix: matrix.module)
def test_factors_in_another_basis_return_at_the_lowest_rank(matrix: LinearMatrix) -> None:
    a, b = kernel_factors(matrix, 2)
    there = matrix.matrix_update(a, b, 1.0)
    turn = np.random.default_rng(1).normal(size=(there.rank, there.rank)).astype(np.float32)
    mixed = LowRankUpdate(np.linalg.inv(turn) @ there.a, there.b @ turn, 1.0)
    back_a, back_b = matrix.kernel_factors(mixed)
    assert back_b.shape == b.shape
    np.testing.assert_allclose(back_a @ back_b, a @ b, atol=1e-4)


def test_unshared_factors_need_a_higher_rank_and_stay_exact() -> None:
    generator = np.random.default_rng(0)
    free = LowRankUpdate(
        generator.normal(size=(2, 8)).astype(np.float32),
        generator.normal(size=(15, 2)).astype(np.float32),
        1.0,
    )
    a, b = ATTENTION.kernel_factors(free)
    assert b.shape == (5, 5)
    np.testing.assert_allclose(ATTENTION.from_kernel(a @ b), free.delta(), atol=1e-5)


def test_files_have_ranks_by_layer_and_round_trip(tmp_path: Path) -> None:
    files = peft_files(adapter())
    config = json.loads(files[PEFT_CONFIG])
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"q_proj": 6}, {"q_proj": 9})
    back = read_peft(write(tmp_path / "a", files))
    assert peft_files(back) == files == peft_files(adapter())


def test_layers_that_differ_are_named_in_full() -> None:
    made = adapter()
    first = "model.layers.0.self_attn.q_proj"
    partly = replace(made, modules={name: f for name, f in made.modules.items() if name != first})
    config = json.loads(peft_files(partly)[PEFT_CONFIG])
    assert config["target_modules"] == sorted(partly.modules)
    padded_first = {**made.modules, first: pad_rank(made.modules[first], 8)}
    config = json.loads(peft_files(replace(made, modules=padded_first))[PEFT_CONFIG])
    assert config["rank_pattern"] == {first: 8, "model.layers.1.self_attn.q_proj": 6}


def test_one_rank_for_all_is_the_same_update() -> None:
    made = adapter()
    config = json.loads(peft_files(uniform_rank(made))[PEFT_CONFIG])
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 9, {})
    for name, factors in uniform_rank(made).modules.items():
        np.testing.assert_array_equal(factors.delta(), made.modules[name].delta())


def test_half_precision_and_rslora_of_others_are_read(tmp_path: Path) -> None:
    folder = changed(
        tmp_path / "a", use_rslora=True, lora_alpha=8, rank_pattern={}, alpha_pattern={}
    )
    made = adapter()
    halves = {
        f"base_model.model.{name}.lora_{letter}.weight": array.astype(ml_dtypes.bfloat16)
        for name, update in made.modules.items()
        for letter, array in (("A", update.a), ("B", update.b))
    }
    save_file(halves, folder / PEFT_WEIGHTS)
    read = read_peft(folder).modules["model.layers.0.self_attn.q_proj"]
    assert read.scale == pytest.approx(8 / 6**0.5)
    expected = made.modules["model.layers.0.self_attn.q_proj"].a
    np.testing.assert_allclose(read.a, expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(
    tmp_path: Path, values: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        read_peft(changed(tmp_path / "a", **values))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (PEFT_WEIGHTS, b"", "not a valid safetensors file"),
        (
            PEFT_WEIGHTS,
            peft_files(adapter())[PEFT_WEIGHTS][:-100],
            "valid safetensors file: .*not fully covered",
        ),
        (
            PEFT_WEIGHTS,
            peft_files(adapter())[PEFT_WEIGHTS][:100],
            "valid safetensors file: .*header",
        ),
        (PEFT_CONFIG, b"{", "is not PEFT's"),
        (PEFT_CONFIG, b'{"peft_type": "LORA", "r": 0, "lora_alpha": 1}', "is not PEFT's: see r"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = write(tmp_path / "a", peft_files(adapter()))
    (folder / name).write_bytes(content)
    with pytest.raises(StageError, match=message):
        read_peft(folder)


def test_every_target_of_the_tiny_model_exists_in_transformers(make_model: Any) -> None:
    model: LanguageModel = make_model(
        preset="tiny", targets=("query", "value", "attention_output", "ffw_gating_2")
    )
    names = [matrix.module for matrix in target_matrices(model.backbone, model.lora)]
    block = "model.layers.5"
    assert len(names) == 4 * 6
    assert {f"{block}.self_attn.{x}_proj" for x in "qvo"} | {f"{block}.mlp.up_proj"} <= set(names)
