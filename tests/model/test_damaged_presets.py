"""A damaged file of a model is an error in plain words, or is read as what it is.

`FUZZ_CASES` sets how many damages of each model are tried.
"""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from job.errors import JobError
from job.machine.devices import make_mesh
from job.model.load import load_model
from job.spec.schema import Model, Runtime
from tests.damage import damage

pytestmark = pytest.mark.slow
CASES = int(os.environ.get("FUZZ_CASES", "40"))
HIDDEN, FEED, VOCABULARY = 16, 32, 300
CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_llama(folder: Path) -> None:
    """Write a small random model in Hugging Face's format."""
    random_ = np.random.default_rng(0)
    weights = {
        "model.embed_tokens": (VOCABULARY, HIDDEN),
        "model.norm": (HIDDEN,),
        "lm_head": (VOCABULARY, HIDDEN),
        **{f"model.layers.0.self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"},
        "model.layers.0.mlp.gate_proj": (FEED, HIDDEN),
        "model.layers.0.mlp.up_proj": (FEED, HIDDEN),
        "model.layers.0.mlp.down_proj": (HIDDEN, FEED),
        "model.layers.0.input_layernorm": (HIDDEN,),
        "model.layers.0.post_attention_layernorm": (HIDDEN,),
    }
    save_file(
        {f"{n}.weight": random_.normal(size=s).astype("float32") for n, s in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1,
        "hidden_size": HIDDEN, "intermediate_size": FEED, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["my ear hurts when it rains", "why does it hurt"] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    own = {"chat_template": CHAT, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **own})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))


@pytest.mark.parametrize("kind", ["hugging face", "keras"])
def test_a_damaged_model_is_refused_or_read(kind: str, two_blocks: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    if kind == "keras":
        shutil.copytree(two_blocks, whole)
    else:
        whole.mkdir()
        write_llama(whole)
    mesh, outcomes = make_mesh(Runtime()), Counter[str]()

    def load(folder: Path) -> None:
        template = "gemma" if kind == "keras" else "auto"
        model = Model(preset=str(folder), dtype="float32", chat_template=template)
        load_model(model, 0, mesh)

    load(whole)
    faults: list[str] = []
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    for case in range(CASES):
        chance = random.Random(case)
        file = files[case % len(files)]
        name, content = damage(file.read_bytes(), chance)
        copy = tmp_path / f"case-{case}"
        shutil.copytree(whole, copy)
        damaged = copy / file.relative_to(whole)
        damaged.unlink()
        if content is not None:
            damaged.write_bytes(content)
        try:
            load(copy)
            outcomes["read"] += 1
        except JobError as error:
            assert str(error).count("\n") == 0, (case, name, file.name)
            outcomes["refused"] += 1
        except BaseException as error:
            faults.append(f"case {case}, {file.name}, {name}: {error!r:.300}")
        finally:
            shutil.rmtree(copy)
    assert not faults
    assert min(outcomes["read"], outcomes["refused"]) > 0, outcomes
