"""What is read out of a compiled program: operations between devices, memory, the highest bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from job.machine.accelerators import parse_machine
from job.plan.cost_analysis import Costs, collectives, compile_program, needed_bytes


def test_costs_and_collectives_come_from_the_compiler() -> None:
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((512, 256), jnp.float32, sharding=split)
    w = jax.ShapeDtypeStruct((256, 128), jnp.float32, sharding=whole)
    found = compile_program(jax.jit(lambda x, w: jnp.sum(x @ w, axis=0), out_shardings=whole), x, w)
    assert found.fits
    assert found.costs.flops == pytest.approx(2 * 128 * 256 * 128, rel=0.05)
    assert found.collectives == {"all-reduce": 1}
    assert found.costs.collective_bytes == 2 * 128 * 4
    assert found.memory > 4 * (128 * 256 + 256 * 128)
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("line", "kinds", "moved"),
    [
        (
            "  %a.1 = (f32[16,8]{1,0:T(8,128)S(1)}, bf16[4]{0:T(8)}) all-reduce(%x, %y), id=1",
            {"all-reduce": 1},
            2 * (16 * 8 * 4 + 4 * 2),
        ),
        (
            "  %g = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%x), dimensions={0}",
            {"all-gather": 1},
            64 * 16 * 2,
        ),
        ("  %d = bf16[64,16]{1,0} all-gather-done(%g)", {}, 0),
        ("  %p = f32[10]{0} add(%all-reduce.1, %all-reduce.2)", {}, 0),
    ],
)
def test_operations_between_devices_are_counted_once(
    line: str, kinds: dict[str, int], moved: float
) -> None:
    assert collectives(line) == (kinds, moved)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (558.79G) exceeds available HBM (15.75G).",
            558.79 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 23.41G of 15.75G hbm.", 23.41 * 2**30),
        ("RESOURCE_EXHAUSTED", 0),
    ],
)
def test_a_refusal_says_what_would_be_needed(message: str, needed: float) -> None:
    assert needed_bytes(message) == int(needed)


def test_the_highest_bound_is_the_time() -> None:
    chip = parse_machine("v5e-8").accelerator
    bounds = Costs(197e12, 819e9 / 2, 200e9 / 4).bounds(chip)
    assert bounds == {"arithmetic": 1.0, "memory": 0.5, "links": 0.25}


def test_costs_add_up() -> None:
    assert Costs(1, 2, 3).plus(Costs(10, 20, 30), 2) == Costs(21, 42, 63)
