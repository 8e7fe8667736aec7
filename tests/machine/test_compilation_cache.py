"""Programs compiled on one machine are found in the bucket by the next."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.bucket import Bucket

PROGRAM = """
import os, sys, jax
from job.machine.devices import configure_cache
from job.spec.schema import Runtime
configure_cache(Runtime(compilation_cache="gs://runs/cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
print("value", float(jax.jit(lambda x: (x * 3 + 1).sum())(jax.numpy.arange(7.0))))
print("hits", events.count("cache_hits"), "misses", events.count("cache_misses"))
"""


def compile_somewhere(url: str, home: Path) -> list[str]:
    environment = os.environ | {"STORAGE_EMULATOR_HOST": url, "JOB_CACHE": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment,
        timeout=120, check=True,
    )  # fmt: skip
    return [line for line in done.stdout.splitlines() if line.startswith(("value", "hits"))]


def test_programs_compiled_on_one_machine_are_read_by_the_next(tmp_path: Path) -> None:
    with Bucket("runs") as service:
        value, first = compile_somewhere(service.url, tmp_path / "one")
        assert value == "value 70.0"
        assert first.startswith("hits 0 misses")
        assert first != "hits 0 misses 0"
        value, second = compile_somewhere(service.url, tmp_path / "two")
        assert value == "value 70.0"
        assert second.endswith("misses 0")
        assert second != "hits 0 misses 0"


@pytest.mark.parametrize("status", [403, 404])
def test_an_unreadable_cache_costs_one_compilation(tmp_path: Path, status: int) -> None:
    with Bucket("runs") as service:
        service.faults.add("/storage/", status=status, times=1000)
        value, _ = compile_somewhere(service.url, tmp_path)
    assert value == "value 70.0"
