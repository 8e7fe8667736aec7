"""The largest micro-batch is found from an estimate, with as few compilations as can be."""

import pytest

from job.plan.cost_analysis import CompiledProgram, Costs
from job.plan.tpu_compile import largest_that_fits

SIZES = [1, 2, 4, 8, 16]


@pytest.mark.parametrize("estimate", [1, 2, 3, 8, 16, 40])
@pytest.mark.parametrize("limit", [0, 1, 2, 7, 8, 16, 100])
def test_any_estimate_leads_to_the_largest_that_fits(limit: int, estimate: int) -> None:
    tried: list[int] = []

    def attempt(size: int) -> CompiledProgram:
        tried.append(size)
        return CompiledProgram(size <= limit, size, 0, Costs(0, 0), 0.0, 0.0)

    found, size = largest_that_fits(SIZES, estimate, attempt)
    assert size == max((n for n in SIZES if n <= limit), default=1)
    assert (found.fits, found.memory) == (limit > 0, size)
    assert len(tried) == len(set(tried))
    if estimate == size:
        assert len(tried) <= 2
