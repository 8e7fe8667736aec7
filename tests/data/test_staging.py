"""What is staged depends on the rows alone: not on interruptions, and not on who asks."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from job.data import staging
from job.data.examples import Example, normal_form
from job.data.readers import read_blocks
from job.data.split_files import iter_examples
from job.errors import StageError, UsageError
from job.storage.lease import LEASE_KEY
from job.storage.local import LocalStore
from tests.data.staged import left_in, spec_of, stage
from tests.services.bucket import Bucket

WORDS = [f"word{n}" for n in range(500)]


def text(number: int) -> str:
    return f"{number} " + " ".join(random.Random(number).choices(WORDS, k=12))


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"input": text(n), "output": text(n + 10**6)} for n in range(start, start + count)]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "SHARD_ROWS", 1000)
        patch.setattr("job.data.readers.MAX_ROWS", 250)
        yield


def manifest(folder: Path, run_id: str = "r") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / run_id / "data/manifest.json").read_bytes())
    return found


def test_rows_are_checked_and_every_one_is_accounted_for(tmp_path: Path) -> None:
    content: list[dict[str, Any]] = rows(50)
    content += [content[0], {"input": content[1]["input"].upper() + "!", "output": text(10**6 + 1)}]
    content += [
        {"input": "", "output": "a"}, {"input": None, "output": "a"}, {"output": "a"},
        {"input": "\ud800", "output": "a"}, {"input": "a" * 300, "output": "b"},
        {"input": "call 555-123-4567 890", "output": "see https://a.example/x"},
        {"input": "mail me at a.b@c.example", "output": "<b>bold</b> &amp; more"},
        {"input": "bell \x07", "output": "<end_of_turn> is neutralised"},
    ]  # fmt: skip
    path = write(tmp_path / "rows.json", content)
    info = stage(spec_of(str(tmp_path / "out"), str(path), checks={"max_characters": 250}))
    assert info.rows.raw == len(content)
    assert info.rows.dropped == {
        "duplicate": 1, "empty prompt": 1, "no column 'input'": 1, "null in 'input'": 1,
        "too long": 1, "undecodable text in 'input'": 1,
    }  # fmt: skip
    assert info.rows.valid == info.rows.raw - sum(info.rows.dropped.values())
    assert info.found == {
        "chat_markup": 1, "control_characters": 1, "emails": 1, "html": 1,
        "normalised_duplicates": 1, "phone_numbers": 1, "urls": 1,
    }  # fmt: skip
    assert info.neutralised == 1
    kept = manifest(tmp_path / "out")
    assert kept["examples"].keys() == info.rows.dropped.keys() | info.found.keys()
    assert kept["examples"]["phone_numbers"].startswith("call 555-123-4567 890 | see https:")
    assert kept["shards"][0]["rows"] == info.rows.valid


@pytest.mark.parametrize(
    ("fault", "bad"),
    [
        ("urls", {"input": "www.example.org", "output": "a"}),
        ("html", {"input": "<p>", "output": "a"}),
        ("normalised_duplicates", {"input": f"{text(3)}!!", "output": text(3 + 10**6)}),
    ],
)
def test_flagged_examples_are_dropped_if_the_spec_says_so(
    fault: str, bad: dict[str, str], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.json", [*rows(40), bad])
    reported = stage(spec_of(str(tmp_path / "a"), str(path)))
    assert (reported.rows.valid, reported.found) == (41, {fault: 1})
    dropped = stage(spec_of(str(tmp_path / "b"), str(path), checks={"drop": [fault]}))
    (reason,) = dropped.rows.dropped
    assert (dropped.rows.valid, dropped.found) == (40, {})
    assert reason.replace(" ", "_").rstrip("s") == fault.rstrip("s")


@pytest.mark.parametrize(
    ("system", "found"), [("See www.example.org.", 40), ("{hint}", 1)], ids=["for all", "for one"]
)
def test_system_texts_are_checked_too(system: str, found: int, tmp_path: Path) -> None:
    content = [{**row, "hint": "Be brief."} for row in rows(40)]
    content[7]["hint"] = "See www.example.org."
    path = write(tmp_path / "rows.json", content)
    info = stage(spec_of(str(tmp_path / "out"), str(path), system=system))
    assert (info.rows.valid, info.found) == (40, {"urls": found})
    assert manifest(tmp_path / "out")["examples"]["urls"] == "See www.example.org."


def test_kept_duplicates_are_never_on_both_sides(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", rows(60) * 3)
    info = stage(spec_of(str(tmp_path / "out"), str(path), drop_duplicates=False))
    assert (info.rows.valid, info.found["duplicates"]) == (180, 120)
    sides = [
        {example.id for example in iter_examples(tmp_path / f"out/r/data/{side}.parquet")}
        for side in ("train", "validation")
    ]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 10


def sides(folder: Path) -> list[list[Example]]:
    """Training and held-out examples."""
    return [list(iter_examples(folder / f"r/data/{n}.parquet")) for n in ("train", "validation")]


def said(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    return {"m": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


def thought(number: int) -> dict[str, Any]:
    row = said(text(number), text(number), "More?", "b")
    row["m"][1]["reasoning_content"] = "Well."
    return row


SAME_PROMPT: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "answers": ([{"input": text(n // 3), "output": text(n)} for n in range(90)], {}),
    "written in other ways": (
        [{"input": text(n // 3).title() + "!" * (n % 3), "output": text(n)} for n in range(90)], {}
    ),
    "other system texts": (
        [{"input": text(n // 3), "output": text(n), "s": f"Be {n}."} for n in range(90)],
        {"system": "{s}"},
    ),
    "conversations": (
        [said(text(n // 3), text(n), *[text(n + 500), "b"][: n % 3]) for n in range(90)],
        {"messages": "m"},
    ),
    "thoughts and tools": (
        [said(text(n // 3), text(n)) for n in range(60)] + [thought(n) for n in range(30)],
        {"messages": "m"},
    ),
    "signs": ([{"input": "?" * (1 + n // 3), "output": text(n)} for n in range(90)], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME_PROMPT)
def test_no_held_out_prompt_is_trained_on(case: str, tmp_path: Path) -> None:
    content, mapping = SAME_PROMPT[case]
    path = write(tmp_path / "rows.json", content)
    info = stage(spec_of(str(tmp_path / "out"), str(path), **mapping))
    trained, held_out = (
        {normal_form(next(m.content for m in e.messages if m.role == "user").encode())
         or e.prompt for e in examples} for examples in sides(tmp_path / "out")
    )  # fmt: skip
    assert len(held_out) == 10
    assert not trained & held_out
    assert (info.left_out >= 10, info.shared_prompts) == (True, 0)
    assert info.train + info.validation + info.left_out == info.rows.valid


def test_a_column_names_what_belongs_together(tmp_path: Path) -> None:
    content = [{**row, "patient": n // 10} for n, row in enumerate(rows(100))]
    content += [{"input": text(n), "output": text(n), "patient": 99} for n in range(50)]
    path = write(tmp_path / "rows.json", content)
    info = stage(spec_of(str(tmp_path / "out"), str(path), group="patient"))
    owner = {row["output"]: row["patient"] for row in content}
    trained, held_out = ({owner[e.response] for e in each} for each in sides(tmp_path / "out"))
    assert not trained & held_out
    assert (info.grouped_by, info.shared_prompts > 0) == ("patient", True)
    with pytest.raises(UsageError, match="no column 'doctor'"):
        stage(spec_of(str(tmp_path / "out"), str(path), group="doctor"))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of rows in three formats, with duplicates across them."""
    folder = tmp_path_factory.mktemp("several")
    write(folder / "a.json", rows(2600))
    (folder / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(2300, 2000)))
    write(folder / "c.json", rows(700, 4200))
    return folder


def shards(output: Path) -> list[dict[str, Any]]:
    """The records of the staged shards."""
    manifests = output.glob("datasets/*/manifest.json")
    return [shard for path in manifests for shard in json.loads(path.read_bytes())["shards"]]


@pytest.fixture(scope="module")
def whole(several: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that is not interrupted leaves."""
    output = tmp_path_factory.mktemp("whole")
    stage(spec_of(str(output), str(several), data_files=FILES))
    return output


def staged_files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in left_in(folder).items() if not name.endswith(LEASE_KEY)}


FILES = ["a.json", "b.jsonl", "c.json"]


def test_a_second_run_uses_the_staged_dataset(several: Path, tmp_path: Path) -> None:
    first = spec_of(str(tmp_path), str(several), data_files=FILES)
    stage(first)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "datasets").rglob("*.parquet")}
    assert len(before) > 3
    again = first.model_copy(update={"seed": 5})
    stage(again, "second")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "datasets").rglob("*.parquet")} == before
    assert manifest(tmp_path, "second")["staged"] == manifest(tmp_path)["staged"]
    other = spec_of(str(tmp_path), str(several), data_files=FILES, prompt="{output}")
    stage(other, "third")
    assert manifest(tmp_path, "third")["staged"] != manifest(tmp_path)["staged"]


class Stopped(Exception):
    """The process ended here."""


@pytest.mark.parametrize("moment", range(0, 13, 2))
def test_interrupted_staging_resumes_after_the_last_shard(
    moment: int, several: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = spec_of(str(tmp_path / "broken"), str(several), data_files=FILES)
    calls = 0

    def after(real: Any) -> Any:
        def write_or_stop(self: LocalStore, *arguments: Any) -> None:
            nonlocal calls
            if "datasets" in self.uri:
                calls += 1
                if calls > moment:
                    raise Stopped
            real(self, *arguments)

        return write_or_stop

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write", after(LocalStore.write))
        patch.setattr(LocalStore, "upload", after(LocalStore.upload))
        with pytest.raises(Stopped):
            stage(broken)
    records = len(shards(tmp_path / "broken"))
    read: list[int] = []

    def counted(*arguments: Any) -> Any:
        for block in read_blocks(*arguments):
            read.append(len(block))
            yield block

    monkeypatch.setattr(staging, "read_blocks", counted)
    stage(broken)
    skipped = sum(shard["tally"]["raw"] for shard in shards(whole)[:records])
    assert sum(read) == 5600 - skipped
    kept, ours = staged_files(whole), staged_files(tmp_path / "broken")
    del kept["r/data/manifest.json"], ours["r/data/manifest.json"]
    assert ours == kept
    assert manifest(tmp_path / "broken") | {"staged": ""} == manifest(whole) | {"staged": ""}


def test_shards_before_an_error_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(1300)) + "{broken\n")
    with pytest.raises(UsageError, match="rows.jsonl"):
        stage(spec_of(str(tmp_path / "out"), str(path)))
    assert [shard["tally"]["raw"] for shard in shards(tmp_path / "out")] == [1000]


def test_downloaded_files_are_deleted_once_they_are_staged(
    several: Path, whole: Path, tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_CACHE", str(tmp_path / "cache"))
    for name in FILES:
        bucket.put("runs", f"set/{name}", (several / name).read_bytes())
    counts: list[int] = []

    def counted(*arguments: Any) -> Any:
        counts.append(len(list((tmp_path / "cache").rglob("*.json*"))))
        yield from read_blocks(*arguments)

    monkeypatch.setattr(staging, "read_blocks", counted)
    stage(spec_of(str(tmp_path / "out"), "gs://runs/set", data_files=FILES))
    assert counts[0] == 1
    assert not list((tmp_path / "cache").rglob("*.json*"))
    assert [each["sha256"] for each in shards(tmp_path / "out")] == [
        each["sha256"] for each in shards(whole)
    ]


def test_a_damaged_shard_is_detected_and_staged_again(several: Path, tmp_path: Path) -> None:
    spec = spec_of(str(tmp_path), str(several), data_files=FILES)
    stage(spec)
    before = left_in(tmp_path)
    (shard,) = (tmp_path / "datasets").rglob("shard-00002.parquet")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StageError, match="shard-00002.parquet is missing or damaged"):
        stage(spec)
    stage(spec)
    assert left_in(tmp_path) == before


def test_all_examples_are_written_in_the_order_of_their_keys(several: Path, tmp_path: Path) -> None:
    every = stage(spec_of(str(tmp_path), str(several), data_files=FILES))
    assert (every.train, every.validation) == (4890, 10)
    some = spec_of(str(tmp_path), str(several), data_files=FILES, train_examples=1234)
    stage(some, "some")
    ids = [e.id for e in iter_examples(tmp_path / "r/data/train.parquet")]
    assert len(set(ids)) == 4890
    assert [e.id for e in iter_examples(tmp_path / "some/data/train.parquet")] == ids[:1234]
    assert pq.read_table(tmp_path / "r/data/validation.parquet").num_rows == 10


def test_the_choice_depends_on_neither_files_nor_their_order(several: Path, tmp_path: Path) -> None:
    chosen = []
    for number, files in enumerate((FILES, FILES[::-1])):
        out = tmp_path / str(number)
        stage(spec_of(str(out), str(several), data_files=files, train_examples=500))
        chosen.append([e.id for e in iter_examples(out / "r/data/train.parquet")])
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"question": "a", "answer": "b"}] * 1200,
         r"none of the first 1\d+ rows .*no column 'input'.*columns are answer, question; change"),
        ([], "has no rows"),
        ([{"input": "", "output": "b"}], r"none of the first 1 rows .*empty prompt \(1\)"),
        ([{"input": "a", "output": "b"}] * 50, "lower data.train_examples"),
    ],
)  # fmt: skip
def test_a_dataset_that_cannot_be_used_says_why(
    content: list[dict[str, str]], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.json", content)
    with pytest.raises(UsageError, match=message):
        stage(spec_of(str(tmp_path / "out"), str(path)))
    assert not (tmp_path / "out/r").exists()
    if "lower" not in message:
        assert not list(tmp_path.glob("out/datasets/*/*"))


def test_contaminated_examples_are_dropped_if_the_spec_says_so(tmp_path: Path) -> None:
    question = "Which drug is the first choice for treating malaria in the first trimester?"
    path = write(
        tmp_path / "rows.json", [*rows(40), {"input": f"Doctor! {question}", "output": "This one."}]
    )
    exam = {"question": question, "a": "x", "b": "y", "gold": "A"}
    (tmp_path / "exam.jsonl").write_text(json.dumps(exam) + "\n")
    spec = spec_of(str(tmp_path / "out"), str(path), checks={"drop": ["contaminated"]})
    entry = {"name": "exam", "dataset": str(tmp_path / "exam.jsonl"), "options": ["a", "b"],
             "answer": "gold"}  # fmt: skip
    filled = type(spec).model_validate(spec.model_dump() | {"evals": {"multiple_choice": [entry]}})
    info = stage(filled)
    assert (info.rows.valid, info.rows.dropped) == (40, {"contaminated": 1})
