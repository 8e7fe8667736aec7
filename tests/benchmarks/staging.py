"""Staging: `job run --until data` against `datasets` doing the same work, on one machine.

Rows are made up, with the lengths of ChatDoctor's (207,408 rows, one JSON array of 223 MB). The
job reads them from a Hub on loopback, checks, hashes, looks for duplicates, stages and samples
them. `datasets` reads the same file from the disk, filters empty rows with `batched=True`,
splits, and writes Parquet. Rows a second are the job's own figure for the whole data stage, and
for `datasets` the time from `load_dataset` to the last write; memory is the peak of each
process, `import jax` included in the job's. The run of two million rows repeats each hundredth.

    uv run python -m tests.benchmarks.staging [--rows 207408] [--many 2000000] [--repeats 1]
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks import report
from tests.services.hub import Hub

INSTRUCTION = (
    "If you are a doctor, please answer the medical questions based on the patient's description."
)
SPEC = """\
name: staging
model: {preset: tiny}
data:
  system: "{instruction}"
  prompt: "{input}"
  response: "{output}"
  train_examples: 1800
  validation_examples: 200
"""
THEIRS = """
import json, sys, time
import datasets
kind, path, folder = sys.argv[1:]
datasets.disable_progress_bars()
clock = time.monotonic()
rows = datasets.load_dataset(kind, data_files=path, split="train", cache_dir=folder)
kept = rows.filter(
    lambda b: [bool(i.strip() and o.strip()) for i, o in zip(b["input"], b["output"])],
    batched=True,
)
split = kept.train_test_split(test_size=200, seed=0)
split["train"].to_parquet(f"{folder}/train.parquet")
split["test"].to_parquet(f"{folder}/test.parquet")
print(json.dumps({"rows": len(rows), "seconds": time.monotonic() - clock}))
"""


def made_rows(count: int, *, repeat: int = 0) -> Iterator[dict[str, str]]:
    """Rows of random words; with `repeat`, every so manieth is one that was before."""
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chance.choices(letters, k=chance.choice([2, 3, 4, 5, 6, 7, 9])))
             for _ in range(3000)]  # fmt: skip
    text = " ".join(chance.choices(words, k=1_000_000))

    def said(mean: float) -> str:
        size = max(20, int(chance.lognormvariate(0, 0.6) * mean / 1.197))
        start = chance.randrange(len(text) - size)
        return f"{text[start : start + size].strip().capitalize()}."

    row: dict[str, str] = {}
    for number in range(count):
        if not repeat or not row or number % repeat:
            row = {"instruction": INSTRUCTION, "input": said(430), "output": said(490)}
        yield row


def write_array(path: Path, count: int) -> None:
    """The rows as one JSON array, indented as ChatDoctor's."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(made_rows(count)):
            file.write(("[\n" if not number else ",\n") + json.dumps(row, indent=4))
        file.write("\n]\n")


def write_parquet(path: Path, count: int, *, repeat: int = 0) -> None:
    """The rows as Parquet, a thousand a row group as on the Hub."""
    schema = pa.schema([(name, pa.string()) for name in ("instruction", "input", "output")])
    with pq.ParquetWriter(path, schema, compression="snappy") as writer:
        batch: list[dict[str, str]] = []
        for row in made_rows(count, repeat=repeat):
            batch.append(row)
            if len(batch) == 1000:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        writer.write_table(pa.Table.from_pylist(batch, schema))


LAUNCH = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[2:], stdout=open(sys.argv[1], "w"))
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024]))
"""
"""Starts a command from a small process: a child is charged for the memory of its parent."""


def measured(command: list[str], environment: dict[str, str]) -> tuple[str, float]:
    """What a command prints, and the peak of its memory in MB."""
    with tempfile.NamedTemporaryFile("r") as out:
        done = subprocess.run(
            [sys.executable, "-c", LAUNCH, out.name, *command],
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            check=True,
        )
        code, peak = json.loads(done.stdout)
        printed = out.read()
    if code:
        raise RuntimeError(f"{command} ended with {code}: {printed[-2000:]}")
    return printed, peak


def ours(dataset: str, folder: Path, environment: dict[str, str]) -> tuple[float, float, Any]:
    """Rows a second, peak MB, and the last event of the data stage."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        (Path(scratch) / "spec.yaml").write_text(SPEC)
        printed, peak = measured(
            [sys.executable, "-m", "job", "run", f"{scratch}/spec.yaml", "--until", "data",
             "--output", f"{scratch}/runs", "--set", f"data.dataset={dataset}"],
            {"JAX_PLATFORMS": "cpu", "JOB_CACHE": f"{scratch}/cache", **environment},
        )  # fmt: skip
    events = [json.loads(line) for line in printed.splitlines()]
    (event,) = [e for e in events if e["message"] == "data split written"]
    return float(event["rows_per_second"]), peak, event


def theirs(kind: str, path: Path, folder: Path) -> tuple[float, float]:
    """Rows a second and peak MB of `datasets`."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        printed, peak = measured(
            [sys.executable, "-c", THEIRS, kind, str(path), scratch], {"HF_HUB_OFFLINE": "1"}
        )
    found = json.loads(printed.splitlines()[-1])
    return found["rows"] / found["seconds"], peak


def main() -> None:
    """Measure both sides and print what was found."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--rows", type=int, default=207_408)
    parser.add_argument("--many", type=int, default=2_000_000, help="0 leaves that run out")
    parser.add_argument("--repeats", type=int, default=1, help="the best of so many counts")
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    table = []
    peaks = []
    with tempfile.TemporaryDirectory() as name, Hub(large=1000) as hub:
        folder = Path(name)
        write_array(folder / "rows.json", given.rows)
        write_parquet(folder / "rows.parquet", given.rows)
        for kind, label in (("json", "json_array"), ("parquet", "parquet")):
            path = folder / f"rows.{kind}"
            hub.add_repo("datasets", f"org/{kind}", {path.name: path.read_bytes()})
            mine, other = [], []
            for _ in range(given.repeats):
                mine.append(ours(f"hf://org/{kind}", folder, {"HF_ENDPOINT": hub.url})[:2])
                other.append(theirs(kind, path, folder))
            speed, peak = max(rate for rate, _ in mine), max(peak for _, peak in mine)
            their_speed, their_peak = max(r for r, _ in other), max(p for _, p in other)
            figures[f"{label}_rows_per_s"] = speed
            figures[f"{label}_vs_datasets"] = speed / their_speed
            peaks.append(peak)
            table.append((label, "job", speed, peak))
            table.append((label, "datasets", their_speed, their_peak))
        figures["peak_rss_mb"] = max(peaks)
        if given.many:
            write_parquet(folder / "many.parquet", given.many, repeat=100)
            speed, peak, event = ours(str(folder / "many.parquet"), folder, {})
            figures["peak_rss_mb_2m"] = peak
            figures["rows_per_s_2m"] = speed
            figures["duplicates_found_2m"] = event["dropped"].get("duplicate", 0)
            table.append((f"parquet, {given.many} rows", "job", speed, peak))
    report.show(
        f"{given.rows} rows, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}",
        ("rows", "who", "rows/s", "peak MB"),
        table,
    )
    report.finish(figures, given.json)


if __name__ == "__main__":
    main()
