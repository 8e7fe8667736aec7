"""Every shipped spec compiles for its accelerator by the TPU's own compiler, and fits.

These need the `tpu` extra and no TPU: `uv run --extra tpu pytest -m tpu`.
"""

import json
import math

import pytest

from tests.test_cli import job

pytestmark = pytest.mark.tpu


def test_every_program_of_the_smoke_spec_compiles() -> None:
    done = job("plan", "smoke", "--on", "v5e-8", "--compile", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["machines"]
    names = [program["name"] for program in found["programs"]]
    assert names == [
        "train", "validate", "letters: questions", "prefill: dialogue", "decode: dialogue",
        "generate: dialogue",
    ]  # fmt: skip
    programs = dict(zip(names, found["programs"], strict=True))
    for program in programs.values():
        assert program["fits"]
        assert 0 < program["bytes"] < 1e9
        assert program["flops"] > 0
        assert program["seconds"] > 0
    train, validate = programs["train"], programs["validate"]
    assert train["flops"] > 2 * validate["flops"]
    # The adapter's gradients are summed over the chips, each at least once in bfloat16.
    assert train["collectives"]["all-reduce"] >= 1
    assert train["collective_bytes"] >= 2 * 2 * 49_152
    whole, first, turn = (
        programs[f"{part}: dialogue"] for part in ("generate", "prefill", "decode")
    )
    assert whole["flops"] == pytest.approx(first["flops"] + 48 * turn["flops"])


@pytest.mark.parametrize("name", ["chatdoctor-gemma3-1b", "chatdoctor-gemma3-1b-published"])
def test_a_shipped_spec_fits_its_accelerator_as_the_plan_says(name: str) -> None:
    from job.machine import devices
    from job.plan.estimate import estimate
    from job.plan.model_shape import find_config, model_shape
    from job.plan.plan import default_machine
    from job.plan.tpu_compile import Compiler
    from job.plan.workload import workload
    from job.spec.load import load_spec

    spec = load_spec(name, []).spec
    on = default_machine(spec)
    config, work = find_config(spec.model), workload(spec)
    planned = estimate(model_shape(config, name), spec, work, on)
    with devices.compiling_for(on) as chips:
        mesh = devices.make_mesh(spec.runtime, chips)
        compiler = Compiler(spec, config, work, on, mesh)
        step = compiler.train_step(planned.micro_batch)
    assert step.fits
    assert planned.memory.fits
    assert planned.memory.total == pytest.approx(step.memory, rel=0.1)
    used = math.prod(planned.mesh.values())
    assert planned.flops_a_step / used == pytest.approx(step.costs.flops, rel=0.1)


def test_a_validation_is_that_of_the_rows_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size before the one that fits was tried too, and must not be what is reported."""
    from job.machine import devices
    from job.machine.accelerators import parse_machine
    from job.plan import tpu_compile
    from job.plan.model_shape import find_config
    from job.plan.tpu_compile import Compiler
    from job.plan.workload import workload
    from job.spec.load import load_spec

    settings = ["runtime.devices=null", "train.batch_size=32", "train.micro_batch=auto"]
    spec = load_spec("smoke", settings).spec
    on = parse_machine("v5e-8")

    def compiler() -> Compiler:
        mesh = devices.make_mesh(spec.runtime, chips)
        return Compiler(spec, find_config(spec.model), workload(spec), on, mesh)

    with devices.compiling_for(on) as chips:
        alone = compiler()
        small, large = alone.train_step(1), compiler().train_step(2)
        expected = alone.validation(1)
        limit = (small.memory + large.memory) // 2
        real = tpu_compile.combine
        monkeypatch.setattr(tpu_compile, "combine", lambda *args: real(*args[:2], limit))
        tried = compiler()
        found, micro = tried.fitting_step(2)
        assert (found.fits, micro) == (True, 1)
        assert tried.validation(micro).costs == expected.costs
        refused = tried.train_step(2)
    assert not refused.fits
    assert refused.costs.flops == 0
