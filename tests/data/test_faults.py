"""Every fault at every endpoint: the result is the same, or the run ends clearly and resumes.

`EVERY_PLACE=1 uv run pytest -m slow tests/data/test_faults.py` meets each fault at the first, the
middle and the last request; otherwise each is met at one of them.
"""

import json
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from job.data import staging
from job.errors import JobError
from job.storage import gcs as bucket_module
from job.storage.lease import LEASE_KEY
from tests.data.staged import spec_of, stage
from tests.services.base import Service
from tests.services.bucket import GRANULE, Bucket
from tests.services.faults import Spoil
from tests.services.hub import Hub

ENDPOINTS = {
    "commit": ("hub", "GET /api/datasets/org/set/revision/"),
    "listing": ("hub", "GET /api/datasets/org/set/tree/"),
    "address": ("hub", "HEAD /datasets/org/set/resolve/"),
    "small file": ("hub", "GET /datasets/org/set/resolve/"),
    "large file": ("cdn", "GET /"),
    "metadata": ("bucket", "GET /storage/v1/b/runs/o/"),
    "content": ("bucket", "GET /download/storage/v1/b/runs/o/"),
    "small write": ("bucket", "uploadType=multipart"),
    "session": ("bucket", "POST /upload/storage/v1/b/runs/o?uploadType=resumable"),
    "chunk": ("bucket", "PUT /upload/storage/v1/b/runs/o"),
    "removal": ("bucket", "DELETE /storage/v1/b/runs/o/"),
}
SPOILS: tuple[Spoil, ...] = ("cut", "stall", "slow", "long", "short", "flip")
FAULTS = ("503 once", "503 thrice", "429", *SPOILS, "503 always")
CONTENT = ("small file", "large file", "content")
"""Endpoints that send the content of files, which is verified; TLS vouches for other replies."""

PLACES = ("first", "middle", "last")


def rows() -> bytes:
    """Rows that do not compress, some of them twice."""
    source = random.Random(1)
    made = [
        {"input": f"{n} " + source.randbytes(180).hex(), "output": source.randbytes(180).hex()}
        for n in range(1500)
    ]
    return json.dumps(made + made[:40]).encode()


ROWS = rows()
README = b"---\nconfigs:\n- config_name: default\n  data_files: rows/*.json\n---\n"


class World:
    """The services, and the outputs of a run in them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hub = Hub(large=10_000, page_size=3)
        self.bucket = Bucket("runs")
        self.folder = folder
        self._patch = monkeypatch
        self._rounds = 0
        self.counts: dict[str, int] = {}
        """Requests to each endpoint of a run without faults."""
        files = {"README.md": README, "rows/a.json": ROWS, "rows/b.json": ROWS[:-1] + b"  ]"}
        self.hub.add_repo("datasets", "org/set", files, private=True)

    def service(self, name: str) -> Service:
        return {"hub": self.hub, "cdn": self.hub.cdn, "bucket": self.bucket}[name]

    def fresh(self) -> None:
        """Empty the bucket and the cache."""
        self.bucket.objects.clear()
        self._rounds += 1
        self._patch.setenv("JOB_CACHE", str(self.folder / str(self._rounds)))

    def run(self) -> Mapping[str, bytes]:
        """Stage the dataset and return the bucket's content."""
        stage(spec_of("gs://runs/out", "hf://org/set", train_examples=100))
        return self.outputs()

    def outputs(self) -> Mapping[str, bytes]:
        """All objects but leases, which expire if a run cannot remove them."""
        objects = self.bucket.objects.items()
        return {name: item.data for (_, name), item in objects if not name.endswith(LEASE_KEY)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        made = World(tmp_path_factory.mktemp("caches"), patch)
        with made.hub, made.bucket:
            patch.setenv("HF_ENDPOINT", made.hub.url)
            patch.setenv("HF_TOKEN", made.hub.token)
            patch.setenv("STORAGE_EMULATOR_HOST", made.bucket.url)
            patch.setenv("JOB_RETRY_SECONDS", "4")
            patch.setenv("JOB_STALL_SECONDS", "0.5")
            patch.setattr(staging, "SHARD_ROWS", 600)
            patch.setattr(bucket_module, "_CHUNK", GRANULE)
            patch.setattr("google.cloud.storage.blob._MAX_MULTIPART_SIZE", GRANULE)
            patch.setattr("job.storage.retry._FIRST_WAIT_SECONDS", 0.02)
            bucket_module.client.cache_clear()
            yield made
        bucket_module.client.cache_clear()


@pytest.fixture(scope="module")
def expected(world: World) -> Mapping[str, bytes]:
    """The outputs of a run without faults."""
    world.fresh()
    outputs = world.run()
    for endpoint, (name, match) in ENDPOINTS.items():
        world.counts[endpoint] = len(world.service(name).requested(match))
    assert {name.rpartition("/")[2] for name in outputs} >= {
        "train.parquet", "validation.parquet", "manifest.json", "shard-00000.parquet",
    }  # fmt: skip
    return outputs


def add_fault(service: Service, match: str, fault: str, skip: int) -> None:
    if fault == "429":
        service.faults.add(match, 429, headers={"Retry-After": "1"}, skip=skip)
    elif fault.startswith("503"):
        times = {"once": 1, "thrice": 3, "always": 10_000}[fault.split()[1]]
        service.faults.add(match, 503, times=times, skip=skip)
    else:
        service.faults.add(match, spoil=fault, skip=skip)  # type: ignore[arg-type]


def inject(world: World, expected: Mapping[str, bytes], endpoint: str, fault: str, at: str) -> None:
    """Inject a fault; the run and the next one must end as they should."""
    name, match = ENDPOINTS[endpoint]
    service = world.service(name)
    count = world.counts[endpoint]
    assert count > 0
    skip = {"first": 0, "middle": count // 2, "last": count - 1}[at]
    world.fresh()
    add_fault(service, match, fault, skip)
    try:
        outputs = world.run()
    except JobError as error:
        assert error.exit_code in (4, 75), error
        assert "run the same command" in str(error)
        assert fault == "503 always"
    else:
        assert outputs == expected
    finally:
        service.faults.clear()
    assert world.run() == expected


def place_of(number: int) -> str:
    """Return one of the three places, in turn."""
    return PLACES[number % 3]


def applies(endpoint: str, fault: str) -> bool:
    """Return whether a fault can occur: HEAD has no body, and TLS protects JSON from flips."""
    if endpoint == "address":
        return fault not in SPOILS
    return fault != "flip" or endpoint in CONTENT


CASES = [
    (endpoint, fault, place)
    for n, endpoint in enumerate(ENDPOINTS)
    for m, fault in enumerate(FAULTS)
    for place in (PLACES if os.environ.get("EVERY_PLACE") else [place_of(n + m)])
    if applies(endpoint, fault)
]
FEW = [
    (endpoint, fault, place_of(n + m))
    for n, endpoint in enumerate(ENDPOINTS)
    for m, fault in enumerate(("503 thrice", "cut", "flip"))
    if applies(endpoint, fault)
]


@pytest.mark.parametrize(("endpoint", "fault", "at"), FEW)
def test_a_fault_changes_nothing(
    world: World, expected: Mapping[str, bytes], endpoint: str, fault: str, at: str
) -> None:
    inject(world, expected, endpoint, fault, at)


@pytest.mark.slow
@pytest.mark.parametrize(("endpoint", "fault", "at"), CASES)
def test_every_fault_at_every_endpoint(
    world: World, expected: Mapping[str, bytes], endpoint: str, fault: str, at: str
) -> None:
    inject(world, expected, endpoint, fault, at)
