"""A damaged data file or chat template is an error in plain words, or is read as what it is.

`FUZZ_CASES` sets how many damages are tried; the number of each is in its message.
"""

import csv
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from job.chat.renderer import ChatRenderer, UnrenderableError
from job.chat.templates import BUILT_IN, ChatTemplate, built_in
from job.errors import JobError
from tests.chat.test_templates import CHAT, Words
from tests.damage import damage
from tests.data.staged import spec_of, stage

pytestmark = pytest.mark.slow
CASES = int(os.environ.get("FUZZ_CASES", "100"))
ROWS = [{"input": f"My ear {n} hurts.\nWhy?", "output": f'It is "{n}", é 痛.'} for n in range(40)]


def _csv(separator: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["input", "output"], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def _arrow(write: Callable[[pa.Table, io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


FILES = {
    "rows.jsonl": "\n".join(json.dumps(row) for row in ROWS).encode(),
    "rows.json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
    "rows.csv": _csv(","),
    "rows.tsv": _csv("\t"),
    "rows.parquet": _arrow(pq.write_table),
    "rows.arrow": _arrow(lambda table, file: pa.feather.write_feather(table, file)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_data_file_is_refused_or_read(name: str, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    for case in range(CASES):
        chance = random.Random(case)
        kind, content = damage(FILES[name], chance)
        if content is None:
            continue
        file = tmp_path / str(case) / name
        file.parent.mkdir()
        file.write_bytes(content)
        spec = spec_of(str(file.parent / "runs"), str(file), validation_examples=2)
        try:
            info = stage(spec)
        except JobError as error:
            assert str(error).count("\n") == 0 or len(str(error)) < 2000, (case, kind)
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"case {case} of {name}, {kind}: {error!r}")
        else:
            copies = 2 if kind == "doubled" else 1
            assert info.rows.raw <= copies * len(ROWS) + 1, (case, kind)
            outcomes["read"] += 1
    assert outcomes["refused"], outcomes


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_damaged_template_is_refused_or_renders(name: str) -> None:
    text = built_in(name).text
    for case in range(5 * CASES):
        kind, content = damage(text.encode(), random.Random(case))
        damaged = ChatTemplate("test", "a test", (content or b"").decode("utf-8", "replace"), {})
        try:
            chat = ChatRenderer(damaged, Words())
            chat.training_texts(CHAT)
            chat.prompt(CHAT[:2])
        except (JobError, UnrenderableError):
            continue
        except Exception as error:
            pytest.fail(f"case {case} of {name}, {kind}: {error!r}")
