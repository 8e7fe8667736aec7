"""The arithmetic of a plan: it grows with what it is a function of, and says the way out."""

import dataclasses
from typing import Any

import pytest

from job.machine.accelerators import machine_sizes, parse_machine
from job.plan.estimate import (
    Layout,
    estimate,
    estimate_memory,
    plan_machine,
    step_flops,
    visible_keys,
)
from job.plan.model_shape import find_config, model_shape
from job.plan.plan import default_machine
from job.plan.workload import workload
from job.results import DataInfo
from job.scores import RowCounts
from job.spec.load import load_spec
from job.spec.schema import Spec

ONE_B = "chatdoctor-gemma3-1b"


def spec_of(*changes: str, name: str = ONE_B) -> Spec:
    return load_spec(name, list(changes)).spec


def estimated(on: str, *changes: str, name: str = ONE_B) -> Any:
    spec = spec_of(*changes, name=name)
    shape = model_shape(find_config(spec.model), spec.model.preset)
    return estimate(shape, spec, workload(spec), parse_machine(on))


def test_the_published_run_is_1800_steps_of_256() -> None:
    work = workload(spec_of(name="chatdoctor-gemma3-1b-published"))
    assert (work.steps, work.slots_a_step, work.loss_share) == (1800, 256, 210 / 256)
    assert {e.name: e.prompts for e in work.evaluations} == {
        "medmcqa-100": 100, "dialogue": 20, "side by side": 3,
    }  # fmt: skip


def test_the_data_stage_s_counts_are_used() -> None:
    found = DataInfo(
        dataset="x", revision=None, rows=RowCounts(raw=9, valid=9, dropped={}), train=512,
        validation=2, neutralised=0,
    )  # fmt: skip
    assert workload(spec_of(), found).examples == 512


def test_rows_of_known_datasets_are_counted_others_assumed() -> None:
    known = workload(spec_of("data.train_examples=all"))
    assert known.examples == 207_408 - 200
    unknown = workload(spec_of("data.train_examples=all", "data.dataset=hf://a/b"))
    assert any("hf://a/b has 1000 rows" in text for text in unknown.assumptions)
    said = workload(spec_of("data.train_examples=all", "data.dataset=hf://a/b"), examples=7)
    assert said.examples == 7


def test_flops_are_four_per_kernel_and_token_plus_overhead() -> None:
    spec = spec_of("train.pack_length=512")
    shape = model_shape(find_config(spec.model), "1b")
    work = workload(spec)
    least = 4 * shape.kernels * work.slots_a_step
    assert least < step_flops(shape, spec, work) < 1.5 * least
    more = spec_of("train.pack_length=512", "train.remat=blocks")
    assert step_flops(shape, more, work) > step_flops(shape, spec, work) + 0.4 * least


def test_visible_keys_are_those_of_the_model() -> None:
    from job.model import attention

    cut = attention.ACCELERATOR
    (layer, *_) = model_shape(find_config(spec_of().model), "1b").layers
    for length, reach in ((512, 100), (1024, 384), (1024, 385), (1024, 386), (4096, 512)):
        before = cut.before(min(reach, layer.window or reach))
        fewer = before + cut.queries if cut.fits(before, length) else length
        assert visible_keys(layer, length, reach) == fewer


def test_a_query_scores_only_the_keys_it_can_see() -> None:
    spec = spec_of()
    local, whole = model_shape(find_config(spec.model), "1b").layers[4:6]
    assert (local.window, whole.window) == (512, None)
    assert visible_keys(local, 1024, 512) == visible_keys(whole, 1024, 512) == 1024
    assert visible_keys(local, 4096, 2048) == 640
    assert visible_keys(whole, 4096, 2048) == 4096
    assert visible_keys(whole, 4096, 1024) == 1152
    assert visible_keys(whole, 512, 512) == 512


def test_memory_depends_on_rows_remat_and_sharding() -> None:
    spec = spec_of()
    shape = model_shape(find_config(spec.model), "1b")
    base = estimate_memory(shape, spec, Layout(8, 1, 4, 2), 0.45)
    assert base.weights == pytest.approx(2e9, rel=0.01)
    assert estimate_memory(shape, spec, Layout(8, 1, 4, 4), 0.45).activations == pytest.approx(
        2 * base.activations, rel=1e-6
    )
    blocks = spec_of("train.remat=blocks")
    assert (
        estimate_memory(shape, blocks, Layout(8, 1, 4, 2), 0.45).activations
        < 0.3 * base.activations
    )
    assert estimate_memory(shape, spec, Layout(2, 4, 4, 2), 0.45).weights == pytest.approx(
        base.weights / 4
    )


def test_a_batch_that_does_not_divide_names_the_next() -> None:
    found = estimated("v5e-128")
    assert (found.rows_a_device, found.batch_size) == (1, 128)
    assert found.advice == ["train.batch_size 128"]


def test_twice_the_chips_take_half_the_time_of_a_step() -> None:
    small, large = estimated("v5e-4").step_seconds, estimated("v5e-8").step_seconds
    assert large == pytest.approx(small / 2, rel=0.02)


def test_gradients_accumulate_if_rows_do_not_fit() -> None:
    found = estimated("v5e-1", "runtime.devices=null")
    assert found.memory.fits
    assert found.micro_batch < found.rows_a_device == 64


def test_a_model_too_large_for_a_chip_is_sharded() -> None:
    spec = spec_of("model.preset=gemma3_instruct_12b_text")
    shape = model_shape(find_config(spec.model), "12b")
    first, second = plan_machine(shape, spec, workload(spec), parse_machine("v5e-8"))
    assert (first.memory.fits, second.memory.fits) == (False, True)
    assert second.mesh["model"] > 1
    assert first.advice[-1] == f"runtime.mesh.model {second.mesh['model']}"


@pytest.mark.parametrize(
    ("on", "changes", "advice"),
    [
        ("v5e-8", ["train.batch_size=512", "train.micro_batch=64"], ["train.micro_batch auto"]),
        (
            "v5e-1",
            ["model.preset=gemma3_instruct_27b_text"],
            ["a machine with more memory or more chips"],
        ),
    ],
)
def test_a_plan_that_does_not_fit_says_what_to_change(
    on: str, changes: list[str], advice: list[str]
) -> None:
    spec = spec_of(*changes)
    shape = model_shape(find_config(spec.model), "x")
    plan = plan_machine(shape, spec, workload(spec), parse_machine(on))[0]
    assert plan.memory.fits is False
    assert plan.advice == advice


def test_a_machine_without_known_speed_has_no_time_and_no_cost() -> None:
    found = estimated("cpu", "runtime.devices=null")
    assert (found.memory.fits, found.step_seconds, found.cost, found.seconds) == (None,) * 4


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ([], "v5e-8"),
        (["runtime.platform=gpu", "runtime.devices=2"], "h100-2"),
        (["runtime.platform=cpu", "runtime.devices=null"], "cpu"),
        (["runtime.platform=any", "runtime.devices=null"], "v5e-8"),
    ],
)
def test_a_spec_says_which_machine_it_is_for(changes: list[str], name: str) -> None:
    assert default_machine(spec_of(*changes)).name == name


def test_all_sizes_are_those_that_can_be_ordered() -> None:
    kind = parse_machine("v5e-8").accelerator
    assert [m.chips for m in machine_sizes(kind)] == [1, 4, 8, 16, 32, 64, 128, 256]
    assert dataclasses.is_dataclass(kind)
