"""Messages in every form that people have: kept as they were meant, or dropped with a reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.chat.conversation import Conversation, Message, Role
from job.data.contamination import clean_rows, find_overlap
from job.data.examples import Example, ExampleMapper, RowDroppedError
from job.data.sources import open_source
from job.data.split_files import iter_examples, renderable_rows, write_split_files
from job.data.staging import StagedDataset, stage_rows
from job.errors import StageError, UsageError
from job.spec.schema import Data
from job.storage.local import LocalStore
from tests.conversations import turns
from tests.data.staged import spec_of, stage

Row = dict[str, Any]
WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOL = {"type": "function", "function": WEATHER}
ARGUMENTS = {"city": "Köln", "days": [1, 2]}
CALL = {
    "id": "call_7",
    "type": "function",
    "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)},
}
PARSED = {
    "id": "call_7",
    "type": "function",
    "function": {"name": "weather", "arguments": ARGUMENTS},
}
USER = {"role": "user", "content": "a"}
REPLY = {"role": "assistant", "content": "b"}


def row(*messages: Row, **columns: Any) -> Row:
    return {"m": list(messages), **columns}


def reply(text: Any = "b", **keys: Any) -> Row:
    return {"role": "assistant", "content": text, **keys}


def said(role: Role, content: str, weight: int = 1, **extra: Any) -> Message:
    text = json.dumps(extra, ensure_ascii=False) if extra else ""
    return Message(role, content, weight, text)


def tools(*definitions: Row) -> Message:
    return Message("tools", json.dumps(list(definitions), ensure_ascii=False))


A, B = said("user", "a"), said("assistant", "b")
THOUGHT = said("assistant", "b", reasoning_content="hm")
CALLED = said("assistant", "", tool_calls=[PARSED])
MAKES_CALL = said(
    "assistant",
    "",
    tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
)
C, D = {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}
CD = (said("user", "c"), said("assistant", "d"))

KEPT: list[tuple[str, Row, tuple[Message, ...]]] = [
    ("weight 0", row(USER, reply(weight=0), C, D), (A, said("assistant", "b", 0), *CD)),
    ("weight false", row(USER, reply(weight=False), C, D), (A, said("assistant", "b", 0), *CD)),
    ("train", row(USER, reply(train=False), C, D), (A, said("assistant", "b", 0), *CD)),
    ("trainable", row(USER, reply(trainable=False), C, D), (A, said("assistant", "b", 0), *CD)),
    ("weight 1", row(USER, reply(weight=1.0, train=True), C, D), (A, B, *CD)),
    ("weight null", row(USER, reply(weight=None)), (A, B)),
    ("weight of a user", row({**USER, "train": False}, REPLY), (A, B)),
    ("nothing learned after", row(USER, REPLY, C, reply("d", weight=0)), (A, B)),
    ("user after the last", row(USER, REPLY, C), (A, B)),
    (
        "one side, two weights",
        row(USER, reply(weight=0), reply("c")),
        (A, said("assistant", "b", 0), said("assistant", "c")),
    ),
    (
        "one side, equal weights",
        row(USER, reply(weight=0), reply("c", weight=0), C, D),
        (A, said("assistant", "b\n\nc", 0), *CD),
    ),
    (
        "parts",
        row({"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, REPLY),
        (said("user", "a\nb"), B),
    ),
    (
        "thinking part",
        row(USER, reply([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}])),
        (A, THOUGHT),
    ),
    (
        "reasoning part of parts",
        row(USER, reply([{"type": "reasoning", "text": ["h", "m"]}, "b"])),
        (A, said("assistant", "b", reasoning_content="h\nm")),
    ),
    *(
        (key, row(USER, reply(**{key: " hm "})), (A, THOUGHT))
        for key in ("reasoning_content", "reasoning", "thinking")
    ),
    ("no thoughts", row(USER, reply(reasoning="", thinking=None)), (A, B)),
    (
        "thoughts are not joined",
        row(USER, reply(thinking="hm"), reply("c")),
        (A, THOUGHT, said("assistant", "c")),
    ),
    (
        "developer",
        row({"role": "developer", "content": "s"}, USER, REPLY),
        turns("a", "b", system="s"),
    ),
    (
        "two system messages",
        row({"role": "system", "content": "s"}, {"role": "developer", "content": "t"}, USER, REPLY),
        turns("a", "b", system="s\n\nt"),
    ),
    (
        "both schemas",
        row({"from": "human", "value": "a"}, REPLY, C, {"from": "gpt", "value": "d"}),
        turns("a", "b", "c", "d"),
    ),
    (
        "both schemas with nulls",
        row(
            {"from": "human", "value": "a", "role": None, "content": None},
            {"from": None, "value": None, "role": "assistant", "content": "b"},
        ),
        turns("a", "b"),
    ),
    (
        "tool calls",
        row(
            USER,
            reply(None, tool_calls=[CALL]),
            {"role": "tool", "tool_call_id": "call_7", "name": "weather", "content": "22.0"},
            REPLY,
            tools=[TOOL],
            parallel_tool_calls=False,
        ),
        (tools(TOOL), A, CALLED, said("tool", "22.0", name="weather", tool_call_id="call_7"), B),
    ),
    (
        "a call to learn",
        row({"role": "system", "content": "s"}, USER, reply("", tool_calls=[CALL]), tools=[TOOL]),
        (tools(TOOL), said("system", "s"), A, CALLED),
    ),
    (
        "results of two calls",
        row(
            USER,
            reply("Look:", tool_calls=[CALL, PARSED]),
            {"role": "ipython", "content": "1"},
            {"role": "tool", "content": ""},
            REPLY,
        ),
        (A, said("assistant", "Look:", tool_calls=[PARSED, PARSED]), said("tool", "1"),
         said("tool", ""), B),
    ),
    (
        "old functions",
        row(
            USER,
            reply(None, function_call=CALL["function"]),
            {"role": "function", "name": "weather", "content": "rain"},
            REPLY,
            functions=[WEATHER],
        ),
        (tools(TOOL), A, MAKES_CALL, said("tool", "rain", name="weather"), B),
    ),
    (
        "sharegpt",
        row(
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": json.dumps(PARSED["function"])},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "b"},
            tools=json.dumps([WEATHER]),
        ),
        (tools(TOOL), A, MAKES_CALL, said("tool", "rain"), B),
    ),
    ("no content", row(USER, {"role": "assistant", "tool_calls": [CALL]}), (A, CALLED)),
    ("tools as texts", row(USER, REPLY, tools=[json.dumps(TOOL)]), (tools(TOOL), A, B)),
    *(
        (f"no tools: {empty!r}", row(USER, reply(tool_calls=empty), tools=empty), (A, B))
        for empty in ([], "", "[]", None)
    ),
    ("names", row({**USER, "name": "Ann"}, REPLY), (said("user", "a", name="Ann"), B)),
]  # fmt: skip

DROPPED: list[tuple[Row, str]] = [
    (row(USER, reply(weight=0.5)), "a weight other than 0 and 1 in 'm'"),
    (row(USER, reply(weight="0")), "a weight other than 0 and 1 in 'm'"),
    (row(USER, reply(weight=0)), "no message to train on"),
    (row(USER, {"role": "tool", "content": "b"}), "no answer in 'm'"),
    (row(USER, REPLY, {"role": "developer", "content": "s"}),
     "system message inside the dialogue in 'm'"),
    (row({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, REPLY),
     "content of type 'image_url' in 'm'"),
    (row({"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}, REPLY),
     "content of type 'thinking' in 'm'"),
    (row({"role": "user", "content": {"text": "a"}}, REPLY), "not text in 'm'"),
    (row(USER, reply(None)), "null in 'm'"),
    (row(USER, reply(None, tool_calls=[])), "null in 'm'"),
    (row(USER, reply("", thinking="hm")), "empty response"),
    (row(USER, reply(thinking={"effort": 1})), "not text in 'm'"),
    (row(USER, reply(thinking="\ud800")), "undecodable text in 'm'"),
    (row(USER, {"role": "tool", "content": None}, REPLY), "null in 'm'"),
    (row(USER, reply(tool_calls="call f")), "malformed 'tool_calls'"),
    (row(USER, reply(tool_calls=["f"])), "malformed 'tool_calls'"),
    (row(USER, reply(tool_calls=[{"function": {"arguments": "{}"}}])), "malformed 'tool_calls'"),
    (row(USER, reply(tool_calls=[{"name": "f", "arguments": "[1]"}])), "malformed 'tool_calls'"),
    (row(USER, reply(tool_calls=[{"name": "f", "arguments": "{"}])), "malformed 'tool_calls'"),
    (row(USER, reply(tool_calls=[{"name": "f", "arguments": "[" * 99_999}])),
     "malformed 'tool_calls'"),
    (row(USER, {"from": "function_call", "value": "f(1)"}), "malformed 'tool_calls'"),
    (row(USER, REPLY, tools="hammer"), "malformed 'tools'"),
    (row(USER, REPLY, tools=[{"type": "web_search"}]), "malformed 'tools'"),
    (row(USER, REPLY, tools=[{"name": b"f"}]), "malformed 'tools'"),
    (row(USER, REPLY, functions=7), "malformed 'functions'"),
]  # fmt: skip

MESSAGES = Data(dataset="samples", messages="m")


def of(given: Row) -> Example:
    return ExampleMapper(MESSAGES)(given)


@pytest.mark.parametrize(("given", "messages"), [pytest.param(*k[1:], id=k[0]) for k in KEPT])
def test_messages_are_kept_as_they_were_meant(given: Row, messages: tuple[Message, ...]) -> None:
    example = of(given)
    assert example.messages == messages
    assert example.prompt_messages == messages[:-1]
    assert example.prompt == [m.content for m in messages if m.role == "user"][-1]


@pytest.mark.parametrize(("given", "reason"), DROPPED)
def test_what_cannot_be_used_is_dropped_with_its_reason(given: Row, reason: str) -> None:
    with pytest.raises(RowDroppedError) as dropped:
        of(given)
    assert str(dropped.value) == reason


def test_the_response_shows_what_the_model_calls() -> None:
    call = {"name": "weather", "arguments": ARGUMENTS}
    called = of(row(USER, reply("Look:", thinking="hm", tool_calls=[CALL])))
    assert called.response == f"Look:\n{json.dumps(call, ensure_ascii=False)}"


def test_rows_that_differ_in_what_is_learned_differ() -> None:
    rows = [
        row(USER, REPLY, C, D),
        row(USER, reply(weight=0), C, D),
        row(USER, reply(thinking="hm"), C, D),
        row(USER, REPLY, C, D, tools=[TOOL]),
        row(USER, reply(tool_calls=[CALL]), C, D),
        row(USER, reply(tool_calls=[CALL], weight=0), C, D),
    ]
    assert len({of(each).id for each in rows}) == len(rows)


def staged(path: Path, folder: Path) -> StagedDataset:
    data = Data(dataset=str(path), messages="m", drop_duplicates=False)
    work = folder.with_name("work")
    work.mkdir()
    return stage_rows(data, open_source(data, "dialogues"), LocalStore(folder), work, lambda: None)


def write_rows(path: Path, rows: list[Row]) -> Path:
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        case ".parquet":
            columns = {name: [each.get(name) for each in rows] for each in rows for name in each}
            pq.write_table(pa.table(columns), path)
    return path


def read_back(dataset: StagedDataset, path: Path) -> list[Example]:
    write_split_files(dataset, {path: np.arange(dataset.manifest.rows)}, lambda: None)
    return list(iter_examples(path))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_staged_messages_are_read_back_as_they_were(suffix: str, tmp_path: Path) -> None:
    rows = [given for _, given, _ in KEPT]
    path = write_rows(tmp_path / f"rows{suffix}", rows + [given for given, _ in DROPPED[:13]])
    dataset = staged(path, tmp_path / "staged")
    assert read_back(dataset, tmp_path / "split.parquet") == [of(each) for each in rows]
    assert sum(dataset.manifest.tally.dropped.values()) == 13


def test_dialogues_in_files_of_earlier_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    earlier = {"id": "1", "system": None, "prompt": "a", "response": "b", "messages": None}
    pq.write_table(pa.Table.from_pylist([earlier | {"history": None}]), path)
    assert [example.messages for example in iter_examples(path)] == [turns("a", "b")]
    pairs = [{"prompt": "c", "response": "d"}]
    pq.write_table(pa.Table.from_pylist([earlier | {"history": pairs}]), path)
    with pytest.raises(StageError, match=r"train\.parquet is of an earlier version.*--fresh"):
        list(iter_examples(path))


def test_nulls_of_parquet_are_no_keys_of_messages(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    rows = [
        row(USER, reply(weight=0), C, D),
        row(USER, reply(tool_calls=[PARSED]), tools=[TOOL, tool]),
        row(USER, reply(None, tool_calls=[call]), {"role": "tool", "content": "1"}, REPLY),
    ]
    dataset = staged(write_rows(tmp_path / "rows.parquet", rows), tmp_path / "staged")
    examples = read_back(dataset, tmp_path / "split.parquet")
    kept = [example.messages for example in examples]
    assert kept == [of(each).messages for each in rows]


def test_only_examples_that_are_not_plain_are_asked_about(tmp_path: Path) -> None:
    rows = [given for _, given, _ in KEPT]
    dataset = staged(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "staged")
    asked: list[Conversation] = []

    def refuse_tools(messages: Conversation) -> str | None:
        asked.append(messages)
        return "tools" if messages[0].role == "tools" else None

    renderable, reasons = renderable_rows(dataset, refuse_tools, lambda: None)
    examples = [of(each) for each in rows]
    assert asked == [example.messages for example in examples if not example.is_plain]
    refused = [example.messages[0].role == "tools" for example in examples]
    assert renderable.tolist() == [not each for each in refused]
    assert reasons == {"tools": sum(refused)}


def numbered(number: int, *replies: Row, **columns: Any) -> Row:
    question = {"role": "user", "content": f"question {number}"}
    return row(question, *replies, **columns)


def test_tools_are_left_out_before_the_split_is_drawn(tmp_path: Path) -> None:
    rows = [numbered(n, REPLY) for n in range(30)]
    rows += [numbered(n, reply(weight=0), C, D) for n in range(30, 40)]
    rows += [numbered(n, reply(tool_calls=[CALL]), tools=[TOOL]) for n in range(7)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    info = stage(spec_of(str(tmp_path / "out"), str(path), messages="m", train_examples=30))
    assert (info.rows.raw, info.rows.valid, info.train, info.validation) == (47, 40, 30, 10)
    assert info.rows.dropped == {"tools, which the chat template does not know": 7}
    kept = [
        example
        for side in ("train", "validation")
        for example in iter_examples(tmp_path / f"out/r/data/{side}.parquet")
    ]
    assert {example.id for example in kept} == {of(each).id for each in rows[:40]}
    assert sum(not example.is_plain for example in kept) == 10


def test_a_dataset_that_cannot_be_rendered_says_why(tmp_path: Path) -> None:
    rows = [numbered(n, REPLY, tools=[TOOL]) for n in range(20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UsageError, match="no example can be rendered: tools, which"):
        stage(spec_of(str(tmp_path / "out"), str(path), messages="m"))


def test_messages_without_a_loss_are_checked_and_searched(tmp_path: Path) -> None:
    question = "Which drug is the first choice for treating malaria in the first trimester?"
    rows = [numbered(n, REPLY) for n in range(20)]
    rows.append(numbered(20, reply(f"see https://a.example\n{question}", weight=0), C, D))
    rows.append(numbered(21, reply(thinking=question)))
    rows += [numbered(22, reply(weight=0), C, D)] * 2
    path = write_rows(tmp_path / "rows.jsonl", rows)
    info = stage(spec_of(str(tmp_path / "out"), str(path), messages="m"))
    assert (info.rows.dropped, info.found) == ({"duplicate": 1}, {"urls": 1})
    dataset = staged(path, tmp_path / "staged")
    clean = clean_rows([question], dataset, lambda: None)
    assert np.flatnonzero(~clean).tolist() == [20, 21]
    overlap = find_overlap({"exam": {"q": question}}, {}, [of(rows[20])])
    assert overlap.slices["exam"].found == 1
