"""Utilization counts what an adapter's training needs, over what the devices can do."""

import pytest

from job.train.metrics import training_flops, utilization


def test_flops_are_four_a_parameter_and_the_head_only_where_there_is_a_loss() -> None:
    assert training_flops(body=700, head=300, tokens=10, loss_tokens=10) == 4 * 1000 * 10
    assert training_flops(body=700, head=300, tokens=10, loss_tokens=4) == 4 * (7000 + 1200)


def test_utilization_is_the_share_of_the_peak_of_all_devices() -> None:
    assert utilization(8 * 197e12, 2.0, "TPU v5 lite", 8) == pytest.approx(0.5)
    assert utilization(1e12, 2.0, "cpu", 1) is None
    assert utilization(1e12, 2.0, "a chip of tomorrow", 1) is None
    assert utilization(1e12, 0.0, "TPU v5 lite", 8) is None
