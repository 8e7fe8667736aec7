"""A checkpoint with unusual numbers gives transformers' logits, or is refused by what differs.

Tiny random checkpoints are made by transformers for each family: other epsilons, kinds of RoPE,
heads tied or not, sizes, windows, biases, and activations. Prompts are shorter and longer than the
windows, and long enough to tell one RoPE from another.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from job.errors import UsageError
from job.model.language_model import LanguageModel
from job.model.tiny import VOCABULARY
from tests.model.test_families import LENGTHS, load_model, logits, prompts
from tests.peers import run_peer

pytestmark = pytest.mark.slow
ROPE = {"linear": "rope_type=linear", "dynamic": "rope_type=dynamic", "yarn": "rope_type=yarn"}
LLAMA3 = {"llama3": "rope_type=llama3", "old_llama3": "rope_type=llama3"}
BIAS = {"attention_bias": "attention_bias=True"}
OTHER_ACTIVATION = {"activation": "hidden_act=relu"}
NESTED_ROPE = {key: ROPE[key] for key in ("dynamic", "yarn")} | {"llama3": LLAMA3["llama3"]}
GEMMA = {
    "untied": "tie_word_embeddings=False", "activation": "hidden_activation=relu", **BIAS,
}  # fmt: skip
SCALED = {"odd_scalar": "query_pre_attn_scalar=100", "theta": "rope_theta=500.0"}
AGREE = "usual epsilon "
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "llama3": (
        AGREE + "theta llama3 old_llama3 tied",
        {**ROPE, **BIAS, **OTHER_ACTIVATION, "head_dim": "head_dim=24", "mlp_bias": "mlp_bias"},
    ),
    "mistral": (
        AGREE + "theta linear head_dim windowed",
        {"dynamic": ROPE["dynamic"], "yarn": ROPE["yarn"], **LLAMA3, **OTHER_ACTIVATION,
         "tied": "tie_word_embeddings=True"},
    ),
    "mixtral": (AGREE + "theta linear windowed", {**LLAMA3, "tied": "tie_word_embeddings=True"}),
    "qwen2": (
        AGREE + "theta linear tied",
        {"dynamic": ROPE["dynamic"], "yarn": ROPE["yarn"], **LLAMA3, **OTHER_ACTIVATION,
         "windowed": "layer_types=|use_sliding_window=True", "one_window": "layer_types="},
    ),
    "qwen3": (
        AGREE + "theta linear tied head_dim",
        {"dynamic": ROPE["dynamic"], "yarn": ROPE["yarn"], **LLAMA3, **OTHER_ACTIVATION, **BIAS,
         "windowed": "use_sliding_window=True", "one_window": "layer_types="},
    ),
    "qwen2_moe": (AGREE + "theta linear tied", LLAMA3),
    "qwen3_moe": (AGREE + "theta linear tied head_dim", {**LLAMA3, **BIAS}),
    "smollm3": (AGREE + "theta", {**ROPE, "untied": "tie_word_embeddings=False"}),
    "gpt2": (AGREE, {"activation": "activation_function=relu"}),
    "gemma": (AGREE + "head_dim", {
        **GEMMA, **ROPE, **LLAMA3, "activation": "hidden_act=relu", "theta": SCALED["theta"],
    }),
    "gemma2": (AGREE + "scalar soft_caps windowed", {**GEMMA, **ROPE, **LLAMA3, **SCALED}),
    "gemma3": (AGREE + "scalar linear", {**GEMMA, **NESTED_ROPE, **SCALED}),
    "gemma4": (AGREE + "theta head_dim soft_caps", {
        **NESTED_ROPE, "linear": ROPE["linear"], "untied": GEMMA["untied"],
    }),
}  # fmt: skip
AGREEING = [f"{family}+{name}" for family, (names, _) in VARIANTS.items() for name in names.split()]
REFUSED = {
    f"{family}+{name}": key for family, (_, keys) in VARIANTS.items() for name, key in keys.items()
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_peer("make_models.py", folder, VOCABULARY, *AGREEING, *REFUSED)
    requests = [
        {
            "model": str(folder / name), "adapter": None, "merge": False, "prompts": prompts(),
            "out": str(folder / f"{name}.npz"),
        }
        for name in AGREEING
    ]  # fmt: skip
    (folder / "requests.json").write_text(json.dumps(requests))
    run_peer("logits.py", folder / "requests.json")
    return folder


@pytest.mark.parametrize("name", AGREEING)
def test_logits_are_those_of_transformers(
    checkpoints: Path, tiny: LanguageModel, name: str
) -> None:
    model = load_model(checkpoints / name, tiny.tokenizer)
    ours = logits(model, model.weights)
    with np.load(checkpoints / f"{name}.npz") as theirs:
        for number in range(len(LENGTHS)):
            np.testing.assert_allclose(ours[number], theirs[str(number)], atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_other_numbers_are_refused(checkpoints: Path, tiny: LanguageModel, name: str) -> None:
    with pytest.raises(UsageError, match=f"sets ({REFUSED[name]})"):
        load_model(checkpoints / name, tiny.tokenizer)
