"""Staging into a bucket, killed repeatedly: the next run ends like an uninterrupted one.

`KILL_ROUNDS=10 uv run pytest -m slow tests/data/test_kills.py` kills it more often.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from job.storage.lease import LEASE_KEY
from tests.data.staged import spec_of
from tests.services.bucket import Bucket
from tests.services.hub import Hub

ROWS = 24_000
SHARD_ROWS = 2048


def array() -> bytes:
    chance = random.Random(3)
    rows = [
        {"input": f"{n} {chance.randbytes(300).hex()}", "output": chance.randbytes(300).hex()}
        for n in range(ROWS)
    ]
    return json.dumps(rows).encode()


def start(spec: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.data.staged", spec, str(SHARD_ROWS)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Wait for the process to end; return its log lines."""
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]


def outputs(bucket: Bucket) -> dict[str, bytes]:
    objects = bucket.objects.items()
    return {name: item.data for (_, name), item in objects if not name.endswith(LEASE_KEY)}


def records(bucket: Bucket) -> int:
    """Count the finished shards."""
    manifests = [d for n, d in outputs(bucket).items() if "/datasets/" in n and ".json" in n]
    return sum(len(json.loads(manifest)["shards"]) for manifest in manifests)


@pytest.mark.slow
def test_killed_at_random_moments_the_next_run_ends_equal(tmp_path: Path) -> None:
    times = 2 * int(os.environ.get("KILL_ROUNDS", "2"))
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    sys.stdout.write(f"seed {seed}\n")
    with Hub(large=1000) as hub, Bucket("runs") as bucket:
        hub.add_repo("datasets", "org/set", {"rows.json": array()})
        environment = {"HF_ENDPOINT": hub.url, "STORAGE_EMULATOR_HOST": bucket.url}
        spec = spec_of("gs://runs/out", "hf://org/set", train_examples=500).model_dump_json()
        finish(start(spec, environment | {"JOB_CACHE": str(tmp_path / "expected")}))
        requests = len(bucket.requests) + len(hub.cdn.requests)
        expected, count = outputs(bucket), records(bucket)
        assert count > 5
        kills = 0
        while kills < times:
            bucket.objects.clear()
            environment["JOB_CACHE"] = str(tmp_path / str(kills))
            for _ in range(chance.randint(1, 4)):
                before = len(bucket.requests) + len(hub.cdn.requests)
                target = before + chance.randrange(requests)
                process = start(spec, environment)
                while len(bucket.requests) + len(hub.cdn.requests) < target:
                    if process.poll() is not None:
                        break
                    time.sleep(0.005)
                time.sleep(chance.uniform(0, 0.1))
                process.send_signal(signal.SIGKILL)
                process.communicate()
                if process.returncode == 0:  # it ended before the signal
                    break
                assert process.returncode == -signal.SIGKILL
                kills += 1
            done_before, fetched = records(bucket), len(hub.cdn.requests)
            finished = any(name.endswith("/manifest.json") for name in outputs(bucket))
            events = finish(start(spec, environment))
            assert outputs(bucket) == expected
            made = [e["shard"] for e in events if e["message"] == "shard staged"]
            assert made == [f"shard-{n:05d}.parquet" for n in range(done_before, count)]
            if done_before:  # then the file was in the cache, and is not downloaded again
                assert len(hub.cdn.requests) == fetched
            sys.stdout.write(f"{kills} kills, {done_before} shards before, finished: {finished}\n")
