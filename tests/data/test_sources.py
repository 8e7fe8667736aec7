"""The same rows come out of every kind of file and of the Hub, and a bad one says where it is."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data import readers
from job.data.data_files import choose_files
from job.data.readers import read_blocks
from job.data.sources import open_source
from job.errors import UsageError
from job.spec.schema import Source
from tests.services.bucket import Bucket
from tests.services.hub import Hub

Rows = list[dict[str, Any]]

ROWS: Rows = [
    {"input": "My knee hurts.", "output": "Rest it."},
    {"input": 'Two\nlines, a comma, "quotes"', "output": "\u4f60\u597d \U0001f600 \u00e9"},
    {"input": " spaces ", "output": "\u2028 and \x85 are no line breaks"},
]


def as_json(rows: Rows) -> bytes:
    return json.dumps(rows, ensure_ascii=False).encode()


def as_jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: Rows) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["input", "output"])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: Rows) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


WRITERS = {
    "rows.json": as_json,
    "rows.jsonl": as_jsonl,
    "rows.ndjson": as_jsonl,
    "rows.csv": as_csv,
    "rows.parquet": as_parquet,
    "ROWS.JSONL": as_jsonl,
}


def read(path: Path | str) -> Rows:
    found = open_source(Source(dataset=str(path)), "dialogues")
    assert found.revision is None
    return list(found)


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRITERS[name](ROWS))
    assert read(tmp_path / name) == ROWS


FIELDS = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"))


@given(st.lists(st.fixed_dictionaries({"input": FIELDS, "output": FIELDS}), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_any_text_survives_every_kind_of_file(
    tmp_path_factory: pytest.TempPathFactory, rows: Rows
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for name, write in WRITERS.items():
        (folder / name).write_bytes(write(rows))
        assert read(folder / name) == rows


def test_rows_have_the_numbers_lists_and_nulls_of_the_file(tmp_path: Path) -> None:
    rows: Rows = [{"a": 1, "b": [1, 2], "c": None}, {"a": 2, "b": [], "c": None}]
    for name in ("rows.json", "rows.jsonl", "rows.parquet"):
        (tmp_path / name).write_bytes(WRITERS[name](rows))
        assert read(tmp_path / name) == rows


def test_a_parquet_file_of_many_batches_is_read_in_order(tmp_path: Path) -> None:
    rows: Rows = [{"input": str(n)} for n in range(3000)]
    (tmp_path / "rows.parquet").write_bytes(as_parquet(rows))
    assert read(tmp_path / "rows.parquet") == rows


def test_blank_lines_and_a_missing_last_line_break_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\n{"a": 1}\r\n  \n{"a": 2}')
    assert read(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}]


def test_a_csv_of_a_spreadsheet_has_no_mark_in_its_first_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfinput,output\r\na,b\r\n")
    assert read(tmp_path / "rows.csv") == [{"input": "a", "output": "b"}]


def test_a_csv_row_that_ends_early_has_nulls(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"input,output\na\n")
    assert read(tmp_path / "rows.csv") == [{"input": "a", "output": None}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', r"rows\.jsonl:2: not valid JSON"),
        ("rows.jsonl", b'{"a": 1}\n\n[1, 2]\n', r"rows\.jsonl:3: a row must be an object"),
        ("rows.jsonl", b'{"a": 1}\n"text"\n', r"rows\.jsonl:2: a row must be an object"),
        ("rows.json", b'[\n{"a": 1},\n{"a": }\n]', r"rows\.json:3: not valid JSON"),
        ("rows.json", b'[{"a": 1} {"a": 2}]', r"rows\.json:1: .*expected ',' before the row"),
        ("rows.json", b'[{"a": 1},]', r"rows\.json:1: .*nothing after the last ','"),
        ("rows.json", b'[,{"a": 1}]', r"rows\.json:1: .*Expecting value"),
        ("rows.json", b'[{"a": 1}', r"rows\.json:1: .*the array has no end"),
        ("rows.json", b'[{"a": 1}] x', r"rows\.json:1: .*text after the end of the array"),
        ("rows.json", b'[{"a": 1}, 5]', r"rows\.json:1: a row must be an object"),
        ("rows.jsonl", b'[{"a": 1}]\n{"a": 2}', r"rows\.jsonl:2: .*text after the end"),
        ("rows.json", b'{"a":' + b"[" * 10**5, r"rows\.json:1: not valid JSON: nested too deep"),
        ("rows.csv", b"a,b\n1,2,3\n", r"rows\.csv:2: more fields than the header names"),
        ("rows.csv", b'a,b\n"1"2,3\n', r"rows\.csv: not a readable CSV file"),
        ("rows.parquet", b"a,b\n1,2\n", r"rows\.parquet: not a readable Parquet file"),
        ("rows.parquet", b"", r"rows\.parquet: not a readable Parquet file"),
    ],
)
def test_a_bad_file_says_what_is_wrong_and_where(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name)


def test_a_line_of_csv_is_not_read_without_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1000)
    (tmp_path / "rows.csv").write_text(f"a,b\n1,2\n{'x,' * 2000}\n")
    with pytest.raises(UsageError, match=r"rows\.csv:3: the line is longer than 128 MB"):
        read(tmp_path / "rows.csv")


def test_bytes_that_are_not_utf8_become_lone_surrogates(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": "\xff"}\n{"a": "b"}\n')
    (tmp_path / "rows.json").write_bytes(b'[{"a": "\xff"}, {"a": "b"}]')
    (tmp_path / "rows.csv").write_bytes("a\n\udcff\nb\n\u00e9\n".encode("utf-8", "surrogateescape"))
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        first, second, *_ = read(tmp_path / name)
        assert second == {"a": "b"}
        with pytest.raises(UnicodeEncodeError):
            first["a"].encode()


def test_nested_bytes_that_are_not_utf8_become_lone_surrogates(tmp_path: Path) -> None:
    turns = [[{"content": b"\xff"}], [{"content": b"b"}], None]
    raw = pa.array(turns, pa.list_(pa.struct([("content", pa.binary())])))
    text = pa.StringArray.from_buffers(2, *raw.values.field("content").buffers()[1:])
    nested = pa.ListArray.from_arrays([0, 1, 2], pa.StructArray.from_arrays([text], ["content"]))
    pq.write_table(pa.table({"messages": nested, "id": ["1", "2"]}), tmp_path / "rows.parquet")
    first, second = read(tmp_path / "rows.parquet")
    assert second == {"messages": [{"content": "b"}], "id": "2"}
    assert first == {"messages": [{"content": "\udcff"}], "id": "1"}


LATIN = [{"input": "Déjà vu; «ça»", "output": "5 € – “café”"}, {"input": "a\tb", "output": "ö"}]
"""Rows that Windows-1252 can write."""


def as_dialect(rows: Rows, delimiter: str, encoding: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["input", "output"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(encoding)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize(
    ("encoding", "rows"),
    [("utf-8-sig", ROWS), ("utf-16", ROWS), ("utf-16-le", ROWS), ("utf-16-be", ROWS),
     ("cp1252", LATIN)],
)  # fmt: skip
def test_a_csv_is_read_in_the_dialect_it_is_written_in(
    encoding: str, rows: Rows, delimiter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rows.csv", "rows.tsv"):
        (tmp_path / name).write_bytes(as_dialect(rows, delimiter, encoding))
        assert read(tmp_path / name) == rows
    shown = capsys.readouterr().out
    assert ("CSV dialect" in shown) == ((encoding, delimiter) != ("utf-8-sig", ","))
    assert encoding == "utf-8-sig" or encoding in shown


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_json_is_read_in_any_unicode_encoding(name: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRITERS[name](ROWS).decode().encode(encoding))
    assert read(tmp_path / name) == ROWS


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 226\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"a,b,a\n1,2,3\n", r"rows\.csv: the header names 'a' more than once"),
        ("rows.csv", b"a,b\n1,2\na,b\n3,4\n", r"rows\.csv:3: the header is repeated"),
        ("rows.csv", "a,b\n你好世界,b\n".encode("gbk"), r"rows\.csv: neither UTF-8, .*save it as"),
        ("rows.csv", "a,b\n".encode("utf-16") + b"\0\xd8", r"rows\.csv: cannot be read: 'utf-16"),
        *((f"rows.{kind}", LFS_POINTER, rf"rows\.{kind}: is a pointer of Git LFS.*git lfs pull")
          for kind in ("json", "jsonl", "csv", "parquet", "arrow")),
    ],
)  # fmt: skip
def test_a_file_people_meet_is_named_for_what_it_is(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name)


def test_columns_without_a_name_may_repeat(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"a;b;;\n1;2;;\n")
    assert read(tmp_path / "rows.csv") == [{"a": "1", "b": "2", "": ""}]


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    rows = [{"input": str(n), "output": "b"} for n in range(3000)]
    one, two = Dataset.from_list(rows), Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one/cache-0123.arrow").write_bytes(
        (tmp_path / "one").glob("d*.arrow").__next__().read_bytes()
    )
    DatasetDict(train=one, test=two).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one") == read(tmp_path / "two") == rows
    test = Source(dataset=str(tmp_path / "two"), split="test")
    assert list(open_source(test, "questions")) == ROWS
    with pytest.raises(UsageError, match="has no split 'dev'; it has test, train"):
        open_source(Source(dataset=str(tmp_path / "two"), split="dev"), "questions")


def test_a_folder_is_read_by_its_layout(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(as_jsonl(ROWS))
    (tmp_path / "test.jsonl").write_bytes(as_jsonl(ROWS[:1]))
    assert read(tmp_path) == ROWS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "there is no file or folder"),
        ("a.txt", "cannot tell the format"),
        ("a.parquet.gz", "cannot tell the format"),
    ],
)
def test_what_is_no_file_of_rows_is_refused(name: str, message: str, tmp_path: Path) -> None:
    for file in ("a.txt", "a.parquet.gz"):
        (tmp_path / file).write_text("text")
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name)


def test_json_files_may_hold_consecutive_objects(
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.json").write_bytes(b'{"a": 1}\n{"a": 2}\n')
    assert read(tmp_path / "rows.json") == [{"a": 1}, {"a": 2}]


def shaped(count: int) -> Rows:
    """Rows of very different lengths, with all that must not be taken for structure."""
    return [
        {
            "input": f'{n} ]}},{{[" \\ \u00e9\U0001f600' + "x" * (n % 7 * 400),
            "output": "\n" * (n % 3),
        }
        for n in range(count)
    ]


@pytest.mark.parametrize("name", [*WRITERS, "rows.jsonl.gz", "rows.json.gz", "rows.csv.gz"])
def test_reading_resumes_at_the_end_of_any_block(name: str, tmp_path: Path) -> None:
    rows = shaped(6000)
    content = WRITERS[name.removesuffix(".gz")](rows)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    blocks = list(read_blocks(path, name))
    assert [row for block in blocks for row in block.rows()] == rows
    assert len(blocks) > 2
    for number in (0, len(blocks) // 2, len(blocks) - 1):
        rest = list(read_blocks(path, name, sum(map(len, blocks[: number + 1]))))
        assert [len(b) for b in rest] == [len(b) for b in blocks[number + 1 :]]
        assert [b.rows() for b in rest[:1]] == [b.rows() for b in blocks[number + 1 :][:1]]


def test_a_row_may_be_longer_than_a_block(tmp_path: Path) -> None:
    rows: Rows = [{"a": "b" * 5_000_000}, {"a": "c"}]
    for name in ("rows.json", "rows.jsonl", "rows.csv", "rows.parquet"):
        (tmp_path / name).write_bytes(
            as_parquet(rows)
            if name.endswith("parquet")
            else {"rows.json": as_json, "rows.jsonl": as_jsonl}.get(
                name, lambda r: b"a\n" + b"\n".join(row["a"].encode() for row in r)
            )(rows)
        )
        assert read(tmp_path / name) == rows


@pytest.mark.parametrize("at", [10_000, 500_000])
def test_an_error_in_a_large_array_names_its_row(at: int, tmp_path: Path) -> None:
    content = bytearray(as_json(shaped(3000)))
    place = content.index(b'"output"', at)
    content[place : place + 8] = b"'output'"
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"rows\.json:1: not valid JSON: Expecting property"):
        read(tmp_path / "rows.json")


def test_the_samples_are_dialogues_or_questions() -> None:
    dialogues = list(open_source(Source(dataset="samples"), "dialogues"))
    questions = list(open_source(Source(dataset="samples"), "questions"))
    assert {tuple(row) for row in dialogues} == {("instruction", "input", "output")}
    assert {"id", "question", "opa", "opb", "opc", "opd", "cop"} <= set(questions[0])
    assert len({row["id"] for row in questions}) == len(questions)


READ_FROM_THE_HUB = """
import json, os
from job.data.sources import open_source
from job.errors import JobError
from job.spec.schema import Source
def read(name, **options):
    try:
        found = open_source(Source(dataset=f"hf://{name}", **options), "dialogues")
        return [found.revision, list(found)]
    except JobError as error:
        return [type(error).__name__, str(error)]
seen = {
    "jsonl": read("org/lines"),
    "first commit": read("org/lines", revision=os.environ["FIRST"]),
    "branch": read("org/lines", revision="main"),
    "parquet": read("org/table"),
    "one file": read("org/two", data_files=["second.jsonl"]),
    "other split": read("org/table", split="validation"),
    "missing": read("org/none"),
    "no revision": read("org/lines", revision="v9"),
    "no split": read("org/lines", split="test"),
    "no config": read("org/lines", config="large"),
    "bad row": read("org/broken"),
    "gated, without a token": read("org/gated"),
}
os.environ["HF_TOKEN"] = "hf_other"
seen["gated, with another's token"] = read("org/gated")
os.environ["HF_TOKEN"] = "hf_stand_in"
seen["gated, with the token"] = read("org/gated")
print(json.dumps(seen))
"""


def test_hub_datasets_are_read_at_a_commit_or_refused(
    tmp_path: Path,
) -> None:
    with Hub() as hub:
        first = hub.add_repo("datasets", "org/lines", {"train.jsonl": as_jsonl(ROWS[:1])})
        second = hub.add_repo("datasets", "org/lines", {"train.jsonl": as_jsonl(ROWS)})
        table = hub.add_repo(
            "datasets",
            "org/table",
            {
                "data/train-00000-of-00001.parquet": as_parquet(ROWS),
                "data/validation-00000-of-00001.parquet": as_parquet(ROWS[1:]),
            },
        )
        files = {"first.jsonl": as_jsonl(ROWS[:1]), "second.jsonl": as_jsonl(ROWS)}
        two = hub.add_repo("datasets", "org/two", files)
        gated = hub.add_repo("datasets", "org/gated", {"train.jsonl": as_jsonl(ROWS)}, gated=True)
        hub.add_repo("datasets", "org/broken", {"train.jsonl": b'{"a": 1}\n{"a": }\n'})
        seen = read_from(hub, tmp_path, FIRST=first)
    assert seen["jsonl"] == seen["branch"] == [second, ROWS]
    assert seen["one file"] == [two, ROWS]
    assert seen["first commit"] == [first, ROWS[:1]]
    assert seen["parquet"] == [table, ROWS]
    assert seen["other split"] == [table, ROWS[1:]]
    assert seen["gated, with the token"] == [gated, ROWS]
    for case, words in {
        "missing": "private: check the name, ask for access at https://huggingface.co/datasets/",
        "no revision": "the dataset hf://org/lines has no revision 'v9'; see https://",
        "no split": "hf://org/lines has no split 'test'; it has train",
        "no config": "hf://org/lines has no config 'large'",
        "bad row": "hf://org/broken/train.jsonl:2: not valid JSON",
    }.items():
        kind, message = seen[case]
        assert (case, kind) == (case, "UsageError")
        assert words in message
    for token in ("without a token", "with another's token"):
        kind, message = seen[f"gated, {token}"]
        assert kind == "SetupError"
        assert "accept its terms at https://huggingface.co/datasets/org/gated" in message


def read_from(hub: Hub, home: Path, **variables: str) -> dict[str, list[Any]]:
    """Run READ_FROM_THE_HUB against the stand-in, in a process and a cache of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", READ_FROM_THE_HUB],
        env={**env, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_files_of_a_bucket_are_read_by_name_and_by_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_CACHE", str(tmp_path))
    with Bucket("data") as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
        bucket.put("data", "set/a.jsonl", as_jsonl(ROWS[:1]))
        bucket.put("data", "set/b.json", as_json(ROWS[1:]))
        bucket.put("data", "set/notes.txt", b"no rows")
        one = open_source(Source(dataset="gs://data/set/a.jsonl"), "dialogues")
        assert list(one) == ROWS[:1]
        both = Source(dataset="gs://data/set", data_files=["*.jsonl", "b.json"])
        assert list(open_source(both, "dialogues")) == ROWS
        before = one.files[0].identity
        bucket.put("data", "set/a.jsonl", as_jsonl(ROWS[2:]))
        again = open_source(Source(dataset="gs://data/set/a.jsonl"), "dialogues")
        assert again.files[0].identity != before
        assert list(again) == ROWS[2:]
        with pytest.raises(UsageError, match=r"there is no object gs://data/none\.jsonl"):
            open_source(Source(dataset="gs://data/none.jsonl"), "dialogues")
        with pytest.raises(UsageError, match=r"no readable file 'c\.csv'; it has a\."):
            open_source(Source(dataset="gs://data/set", data_files=["c.csv"]), "dialogues")


def test_files_of_a_folder_are_read_by_pattern(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS[:1]))
    (tmp_path / "deep/b.jsonl").write_bytes(as_jsonl(ROWS[1:]))
    for pattern in (["**/*.jsonl"], ["a.jsonl", "deep/*.jsonl"]):
        source = Source(dataset=str(tmp_path), data_files=pattern)
        assert list(open_source(source, "dialogues")) == ROWS
    assert (
        list(open_source(Source(dataset=str(tmp_path), data_files=["*"]), "dialogues")) == ROWS[:1]
    )


def hub_source(given: Mapping[str, Any] | None = None) -> Source:
    """The section of a dataset on the Hub; `given` may hold its README too."""
    keys = {key: value for key, value in (given or {}).items() if key != "readme"}
    return Source(dataset="hf://org/set", **keys)


README_HEAD = """---
configs:
- config_name: small
  data_files: small/*.jsonl
- config_name: default
  data_files:
  - split: train
    path: [a.jsonl, more/*.jsonl]
  - split: test
    path: held.jsonl
---
"""
README_IN = "---\nconfigs:\n- config_name: only\n  data_dir: ./in/\n---\n"


@pytest.mark.parametrize(
    ("paths", "wanted", "chosen"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
          "data/test-00000-of-00001.parquet"], {},
         ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
        (["train.csv", "dev.csv", "extra.json"], {"split": "validation"}, ["dev.csv"]),
        (["validation/a.jsonl", "training/b.jsonl"], {}, ["training/b.jsonl"]),
        (["chatdoctor200k.json", "README.md", ".gitattributes"], {}, ["chatdoctor200k.json"]),
        (["b.jsonl", "a.jsonl", "strain.txt"], {}, ["a.jsonl", "b.jsonl"]),
        (["rows.jsonl.gz"], {}, ["rows.jsonl.gz"]),
        (["a.jsonl", "more/b.jsonl", "held.jsonl", "small/s.jsonl"], {"readme": README_HEAD},
         ["a.jsonl", "more/b.jsonl"]),
        (["a.jsonl", "more/b.jsonl", "held.jsonl", "small/s.jsonl"],
         {"readme": README_HEAD, "split": "test"}, ["held.jsonl"]),
        (["a.jsonl", "more/b.jsonl", "held.jsonl", "small/s.jsonl"],
         {"readme": README_HEAD, "config": "small"}, ["small/s.jsonl"]),
        (["a.csv", "config.json", "dataset_infos.json"], {}, ["a.csv"]),
        (["b.json", "a.jsonl", ".hidden.jsonl", "__made__/c.jsonl"], {}, ["a.jsonl", "b.json"]),
        (["a.jsonl", "in/b-test.jsonl", "in/train.jsonl"],
         {"readme": README_IN, "split": "test"}, ["in/b-test.jsonl"]),
    ],
)  # fmt: skip
def test_the_layout_of_a_hub_dataset_says_which_files_a_split_is(
    paths: list[str], wanted: dict[str, str], chosen: list[str]
) -> None:
    readme = wanted.get("readme", "").encode()
    assert choose_files(hub_source(wanted), paths, readme) == chosen


TWICE = b"""---
configs:
- config_name: x
  data_files:
  - split: %s
    path: a.jsonl
  - split: %s
    path: a.jsonl
---
"""
NUMBER = (TWICE % (b"train", b"test")).replace(b"a.jsonl", b"[5]")
TWO_CONFIGS = "---\nconfigs:\n- config_name: x\n- config_name: y\n---\n"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"data_files": ["/etc/hosts"]}, r"no readable file '/etc/hosts'; it has a\.jsonl"),
        ({"data_files": ["https://a.b/c.jsonl"]}, r"no readable file 'https://a\.b/c\.jsonl'"),
        ({"data_files": ["../a.jsonl"]}, r"no readable file '\.\./a\.jsonl'"),
        ({"data_files": ["a.jsonl"], "config": "x"}, r"data_files and config cannot both be set"),
        ({"readme": b"---\nconfigs: 5\n---\n"}, r"README\.md cannot be used: .*in data_files"),
        ({"readme": b"---\nconfigs: [a: [\n---\n"}, r"README\.md cannot be used: .*in data_files"),
        ({"readme": TWO_CONFIGS.encode()}, r"several configs; write one of x, y in config"),
        ({"readme": TWO_CONFIGS.encode(), "config": "z"}, r"no config 'z'; it has x, y"),
        ({"readme": NUMBER}, r"no readable file '5'; it has a\.jsonl"),
        ({"readme": (TWICE % (b"train", b"train"))}, r"`configs` of the README\.md cannot be used"),
        ({"readme": (TWICE % (b"train", b"a b"))}, r"header of the README\.md cannot be used"),
        ({"split": "dev"}, r"has no split 'dev'; it has train"),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_fit_is_refused_with_the_way_out(
    wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_files(hub_source(wanted), ["a.jsonl", "notes.txt"], wanted.get("readme"))


SCRIPT = ["set.py", "raw/rows.json"]


def test_a_loading_script_is_not_taken_for_its_files() -> None:
    with pytest.raises(UsageError, match=r"a loading script \(set\.py\).*refs/convert/parquet"):
        choose_files(hub_source(), SCRIPT)
    assert choose_files(hub_source({"data_files": ["raw/*"]}), SCRIPT) == SCRIPT[1:]


def test_a_folder_without_rows_says_so() -> None:
    with pytest.raises(UsageError, match=r"org/set has no file in a format that can be read"):
        choose_files(hub_source(), ["notes.txt", "config.json"])


def test_a_split_that_cannot_be_named_says_so() -> None:
    path = "data/my-own-00000-of-00001.jsonl"
    with pytest.raises(UsageError, match=r"names of the files cannot be used: Split name should"):
        choose_files(hub_source(), [path])
