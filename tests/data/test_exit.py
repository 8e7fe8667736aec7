"""The data stage ends with exit code 0, every time: nothing of it aborts as Python ends.

`EXIT_RUNS=100 uv run pytest -m slow tests/data/test_exit.py` is the full count.
"""

import io
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.staged import spec_of
from tests.services.bucket import Bucket
from tests.services.hub import Hub


@pytest.mark.slow
def test_every_run_ends_well(tmp_path: Path) -> None:
    chance = random.Random(0)
    rows = [
        {"input": f"{n} {chance.randbytes(50).hex()}", "output": chance.randbytes(50).hex()}
        for n in range(6000)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=500)
    codes = []
    with Hub(large=1000) as hub, Bucket("runs") as bucket:
        hub.add_repo("datasets", "org/set", {"rows.parquet": buffer.getvalue()})
        spec = spec_of("gs://runs/out", "hf://org/set", train_examples=500).model_dump_json()
        for number in range(int(os.environ.get("EXIT_RUNS", "5"))):
            bucket.objects.clear()
            done = subprocess.run(
                [sys.executable, "-m", "tests.data.staged", spec, "1000"],
                env={
                    **os.environ,
                    "HF_ENDPOINT": hub.url,
                    "STORAGE_EMULATOR_HOST": bucket.url,
                    "JOB_CACHE": str(tmp_path / str(number)),
                },
                stdout=subprocess.DEVNULL,
                timeout=120,
                check=False,
            )
            codes.append(done.returncode)
    assert set(codes) == {0}, codes
