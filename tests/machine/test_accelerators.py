"""The registry: names to machines and back, device kinds, cloud names, quotas and costs."""

import json
import math
import re
import subprocess
import sys

import pytest

from job.cli import app
from job.errors import UsageError
from job.machine.accelerators import ACCELERATORS, find_accelerator, machine_spec, parse_machine


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "accelerator_type", "machine_type", "topology_name"),
    [
        ("v5e-1", 1, 1, "v5litepod-1", "ct5lp-hightpu-1t", "v5e:1x1"),
        ("v5e-8", 8, 1, "v5litepod-8", "ct5lp-hightpu-8t", "v5e:2x4"),
        ("v5e-16", 16, 4, "v5litepod-16", "ct5lp-hightpu-4t", "v5e:4x4"),
        ("v5e-256", 256, 64, "v5litepod-256", "ct5lp-hightpu-4t", "v5e:16x16"),
        ("v5p-8", 4, 1, "v5p-8", "ct5p-hightpu-4t", "v5p:2x2x1"),
        ("v5p-16", 8, 2, "v5p-16", "ct5p-hightpu-4t", "v5p:2x2x2"),
        ("v6e-8", 8, 1, "v6e-8", "ct6e-standard-8t", "v6e:2x4"),
        ("v6e-32", 32, 8, "v6e-32", "ct6e-standard-4t", "v6e:4x8"),
        ("v4-8", 4, 1, "v4-8", "ct4p-hightpu-4t", "v4:2x2x1"),
        ("h100-1", 1, 1, None, "a3-highgpu-1g", None),
        ("h100-16", 16, 2, None, "a3-highgpu-8g", None),
        ("h200-8", 8, 1, None, "a3-ultragpu-8g", None),
        ("cpu", 1, 1, None, None, None),
    ],
)
def test_a_name_says_what_to_order(
    name: str,
    chips: int,
    hosts: int,
    accelerator_type: str | None,
    machine_type: str | None,
    topology_name: str | None,
) -> None:
    found = parse_machine(name)
    assert found.name == name
    assert (found.chips, found.hosts) == (chips, hosts)
    assert found.accelerator_type == accelerator_type
    assert found.machine_type == machine_type
    assert found.topology_name == topology_name


@pytest.mark.parametrize(
    ("written", "name"),
    [("V5E-8", "v5e-8"), ("v5litepod-8", "v5e-8"), ("v5e", "v5e-1"), ("v5p", "v5p-8")],
)
def test_names_are_read_as_people_write_them(written: str, name: str) -> None:
    assert parse_machine(written).name == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5x-8", ["'v5x-8'", "v5e, v5p, v6e, v4, h100", "like v5e-8", "did you mean v5"]),
        ("v5e-7", ["'v5e-7'", "v5e-1, v5e-4, v5e-8"]),
        ("v5e-0", ["v5e-1, v5e-4"]),
        ("v5p-4", ["v5p does not have this size", "v5p-8, v5p-16"]),
        ("h100-0", ["at least 1"]),
        ("v5e-8-8", ["not a known accelerator"]),
        ("", ["not a known accelerator"]),
    ],
)
def test_an_unknown_name_says_what_to_write(name: str, expected: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_machine(name)
    for words in expected:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", "v4"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("cpu", "cpu"),
    ],
)
def test_jax_names_are_known(device_kind: str, name: str) -> None:
    found = find_accelerator(device_kind)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "TPU v7", ""])
def test_an_unknown_chip_has_no_peak_rather_than_a_wrong_one(kind: str) -> None:
    assert find_accelerator(kind) is None


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=lambda a: a.name)
def test_every_size_of_a_kind_can_be_ordered(accelerator: object) -> None:
    found = next(a for a in ACCELERATORS if a is accelerator)
    for chips, shape in found.topologies.items():
        asked = parse_machine(f"{found.name}-{chips * found.cores}")
        assert asked.chips == chips == math.prod(map(int, shape.split("x")))
        assert asked.hosts * asked.chips_per_host == chips
        assert asked.machine_type is not None
        assert found.runtime_version
    if found.price is not None:
        assert re.fullmatch(r"20\d\d-\d\d", found.price.date)


def test_small_v5e_slices_count_against_the_serving_quota() -> None:
    small, large = parse_machine("v5e-8").quota, parse_machine("v5e-16").quota
    assert small is not None
    assert large is not None
    assert small.spot == "TPUV5sPreemptibleLitepodServingPerProjectPerZoneForTPUAPI"
    assert large.spot == "TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI"
    assert large.on_demand == "TPUV5sLitepodPerProjectPerZoneForTPUAPI"


def test_a_cost_is_that_of_all_chips_or_unknown() -> None:
    assert parse_machine("v5e-8").cost(3600) == pytest.approx(9.60)
    assert parse_machine("v5e-8").cost(1800, spot=True) == pytest.approx(0.98)
    assert parse_machine("v4-8").cost(3600, spot=True) is None
    assert parse_machine("cpu").cost(3600) is None


def test_the_registry_imports_nothing_heavy() -> None:
    code = (
        "import sys, job.machine.accelerators;"
        "sys.exit(bool({'jax', 'keras', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_order_has_what_scripts_ask_for() -> None:
    found = machine_spec(parse_machine("v5e-8"))
    expected = {
        "machine": "v5e-8", "platform": "tpu", "chips": 8, "hosts": 1,
        "accelerator_type": "v5litepod-8", "runtime_version": "v2-alpha-tpuv5-lite",
        "machine_type": "ct5lp-hightpu-8t",
        "image_family": None,  # Compute Engine does not create v5e machines
        "spot_quota": "TPUV5sPreemptibleLitepodServingPerProjectPerZoneForTPUAPI",
    }  # fmt: skip
    assert found | expected == found
    assert found["usd_per_hour"] == pytest.approx(9.60)
    assert found["spot_usd_per_hour"] == pytest.approx(1.96)
    assert found["spot_usd_per_hour_by_region"]["us-west4"] == pytest.approx(8 * 0.578)
    v6e = machine_spec(parse_machine("v6e-8"))
    assert v6e["image_project"] == "ubuntu-os-accelerator-images"
    assert machine_spec(parse_machine("v4-8"))["image_family"] is None
    assert machine_spec(parse_machine("cpu"))["usd_per_hour"] is None


def test_the_command_prints_orders(capsys: pytest.CaptureFixture[str]) -> None:
    app(["accelerators", "v5e-8", "v5e-16", "--json"], standalone_mode=False)
    printed = json.loads(capsys.readouterr().out)
    assert [one["machine"] for one in printed] == ["v5e-8", "v5e-16"]
    assert [one["hosts"] for one in printed] == [1, 4]
    app(["accelerators"], standalone_mode=False)
    listed = capsys.readouterr().out
    for words in ("v5e-256", "v5litepod-8", "9.60 USD/h, spot 1.96", "no price"):
        assert words in listed
