"""Training starts from exactly an earlier adapter, or the error says why it cannot."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from job.adapters.hf_weight_map import target_matrices
from job.adapters.keras_format import load_adapter, save_adapter
from job.adapters.locate import find_adapter
from job.adapters.peft_format import peft_files, read_peft, to_peft
from job.adapters.warm_start import starting_lora
from job.errors import StageError, UsageError
from job.model.language_model import LanguageModel
from job.model.lora import LoraWeights, flatten_lora
from job.pipeline.run import Run
from job.pipeline.stages import stage_digests
from job.pipeline.train_stage import load_trained, write_adapter
from job.runtime.signals import StopSignal
from job.spec.schema import Spec
from job.storage.local import LocalStore
from tests.conftest import MakeModel
from tests.data.staged import MACHINE

ADAPTER = "adapter.lora.h5"


def make_run(
    folder: Path, model: LanguageModel, init: Path | None = None, **model_spec: Any
) -> Run:
    lora = {"rank": model.lora.rank, "alpha": model.lora.alpha}
    spec = Spec.model_validate({
        "name": "t",
        "model": {"preset": "tiny", "dtype": "float32", "lora": lora} | model_spec,
        "data": {"dataset": "samples", "prompt": "{input}", "response": "{output}"},
        "train": {"init_adapter": init and str(init)},
    })  # fmt: skip
    return Run("t", spec, LocalStore(folder), folder / "work", StopSignal(), MACHINE)


def start_from(run: Run, model: LanguageModel) -> LoraWeights:
    uri = run.spec.train.init_adapter
    assert uri is not None
    earlier = find_adapter(uri, "train.init_adapter", "adapter/")
    return starting_lora(run.spec, model, earlier, run.work / "init_adapter")


def trained(model: LanguageModel) -> LoraWeights:
    generator = np.random.default_rng(1)
    return tuple(
        (a, jnp.asarray(generator.normal(0, 0.1, b.shape), jnp.float32))
        for a, b in model.lora.init(3)
    )


@pytest.fixture
def earlier(tmp_path: Path, make_model: MakeModel) -> Path:
    """A run with an adapter of rank 4 and alpha 8 on query and value."""
    model = make_model(rank=4, alpha=8)
    run = make_run(tmp_path / "earlier", model)
    run.work.mkdir(parents=True)
    write_adapter(run, model, trained(model), target_matrices(model.backbone, model.lora))
    return tmp_path / "earlier"


def assert_same(ours: LoraWeights, theirs: LoraWeights) -> None:
    for a, b in zip(flatten_lora(ours), flatten_lora(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("folder", ["", "adapter", "adapter/peft"])
def test_a_run_and_its_adapter_folders_give_the_same_weights(
    earlier: Path, tmp_path: Path, make_model: MakeModel, folder: str
) -> None:
    model = make_model(rank=4, alpha=8)
    run = make_run(tmp_path / "later", model, earlier / folder)
    assert_same(start_from(run, model), trained(model))


def test_saving_it_again_gives_the_same_files(
    earlier: Path, tmp_path: Path, make_model: MakeModel
) -> None:
    model = make_model(rank=4, alpha=8)
    run = make_run(tmp_path / "later", model, earlier / "adapter/peft")
    write_adapter(run, model, start_from(run, model), target_matrices(model.backbone, model.lora))
    for name in (ADAPTER, "adapter.json", "peft/adapter_model.safetensors"):
        there, here = earlier / "adapter" / name, tmp_path / "later/adapter" / name
        assert there.read_bytes() == here.read_bytes()


def test_loading_and_saving_preserves_the_bytes(
    earlier: Path, tmp_path: Path, make_model: MakeModel
) -> None:
    path = earlier / "adapter" / ADAPTER
    layout, lora = load_adapter(path, make_model(rank=4).lora)
    save_adapter(tmp_path / "again.h5", layout, lora)
    assert (tmp_path / "again.h5").read_bytes() == path.read_bytes()


def test_a_higher_rank_and_alpha_start_as_the_same_update(
    earlier: Path, tmp_path: Path, make_model: MakeModel
) -> None:
    before, model = make_model(rank=4, alpha=8), make_model(rank=6, alpha=3)
    run = make_run(tmp_path / "later", model, earlier)
    start = start_from(run, model)
    for (a, b), (old_a, old_b) in zip(start, trained(before), strict=True):
        np.testing.assert_allclose(0.5 * (a @ b), 2.0 * (old_a @ old_b), atol=1e-6)
        assert np.any(a[..., 4:])
        assert not np.any(b[4:])
    spec = run.spec.model
    again = to_peft(model, spec, start, target_matrices(model.backbone, model.lora))
    for name, factors in read_peft(earlier / "adapter/peft").modules.items():
        np.testing.assert_allclose(again.modules[name].delta(), factors.delta(), atol=1e-6)


def test_layers_it_lacks_start_fresh(earlier: Path, tmp_path: Path, make_model: MakeModel) -> None:
    model = make_model(rank=4, alpha=8, targets=("query", "value", "key"))
    start = start_from(make_run(tmp_path / "later", model, earlier), model)
    for target, (_, b) in zip(model.lora.targets, start, strict=True):
        assert np.any(b) != target.path.endswith("key")


def test_a_mismatch_is_refused_with_the_way_out(
    earlier: Path, tmp_path: Path, make_model: MakeModel
) -> None:
    def refused(init: Path, message: str, *, preset: str = "tiny", **model: Any) -> None:
        made = make_model(**{"rank": 4, "alpha": 8} | model)
        with pytest.raises(UsageError, match=message):
            start_from(make_run(tmp_path / "later", made, init, preset=preset), made)

    for folder in (earlier, earlier / "adapter/peft"):
        refused(folder, "needs rank 4 here, and model.lora.rank is 2; raise it to 4", rank=2)
        refused(folder, r"adapts .*value|adapts .*v_proj.* add them", targets=("query",))
    refused(earlier, r"trained on tiny .* but the model is hf://a/b", preset="hf://a/b")
    refused(
        tmp_path / "nowhere",
        r"nowhere has no adapter: it has neither adapter/adapter.json nor adapter.json nor PEFT",
    )


def test_peft_adapter_of_another_model_is_refused(
    earlier: Path, tmp_path: Path, make_model: MakeModel
) -> None:
    adapter = read_peft(earlier / "adapter/peft")
    other = {
        name: update._replace(a=np.pad(update.a, ((0, 0), (0, 8))))
        for name, update in adapter.modules.items()
    }
    folder = tmp_path / "other"
    folder.mkdir()
    for name, content in peft_files(replace(adapter, modules=other)).items():
        (folder / name).write_bytes(content)
    model = make_model(rank=4)
    with pytest.raises(UsageError, match=r"has shape \(\d+, 72\).*another model"):
        start_from(make_run(tmp_path / "later", model, folder), model)


def test_a_truncated_file_is_an_error_wherever_it_is_read(
    earlier: Path, tmp_path: Path, make_model: MakeModel
) -> None:
    model = make_model(rank=4, alpha=8)
    path = earlier / "adapter" / ADAPTER
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(StageError, match="is not a LoRA file of this model"):
        start_from(make_run(tmp_path / "later", model, earlier), model)
    with pytest.raises(StageError, match="does not have the checksum in adapter.json"):
        load_trained(make_run(earlier, model), model)


def test_the_train_digest_covers_the_adapters_content(
    earlier: Path, tmp_path: Path, tiny: LanguageModel
) -> None:
    spec = make_run(tmp_path / "later", tiny, earlier).spec
    before = stage_digests(spec)
    assert stage_digests(spec) == before
    path = earlier / "adapter" / ADAPTER
    path.write_bytes(path.read_bytes() + b"x")
    after = stage_digests(spec)
    assert {name for name in after if after[name] != before[name]} == {
        "train",
        "finetuned",
        "judge",
        "report",
    }
