"""Whole columns give what single rows give; dialogues are taken apart turn by turn."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.columnar import ExampleColumns, example_from_columns, to_columns
from job.data.examples import (
    Example,
    ExampleMapper,
    RowDroppedError,
    exact_hash,
    normal_form,
    opening,
)
from job.data.row_blocks import ArrowBlock, RowBlock
from job.spec.schema import Data
from tests.conversations import turns

SPECS = [
    {"prompt": "{a}", "response": "{b}"},
    {"prompt": "Q: {a} ({c})", "response": "{b}", "system": "{c}"},
    {"prompt": "{a}{{}}{b}", "response": " {b} ", "system": " Be kind. "},
]
TEXT = st.text(
    alphabet=st.sampled_from(
        ["a", "B", " ", "\n", "\t", "\x1f", "\u00a0", "\u2028", "é", "{", "%"]
    ),
    max_size=6,
)
VALUES = st.one_of(st.none(), TEXT)
ODD = st.one_of(VALUES, st.integers(0, 9), st.just(float("nan")), st.just(["x"]), st.just("\ud800"))
ROWS = st.lists(st.fixed_dictionaries({"a": VALUES, "b": VALUES, "c": VALUES}), max_size=8)
ODD_ROWS = st.lists(st.dictionaries(st.sampled_from("abc"), ODD), max_size=8)


def by_row(rows: list[dict[str, Any]], data: Data) -> tuple[list[Any], list[Any]]:
    examples, dropped = [], []
    for number, row in enumerate(rows):
        try:
            examples.append((number, ExampleMapper(data)(row)))
        except RowDroppedError as reason:
            dropped.append((number, str(reason)))
    return examples, dropped


def examples_of(mapped: ExampleColumns) -> list[tuple[int, Example]]:
    """The examples of columns, one by one."""
    made = []
    dialogues = mapped.dialogues().to_pylist()
    for number, text, row in zip(
        mapped.rows.tolist(), dialogues, mapped.batch.to_pylist(), strict=True
    ):
        system = row.pop("system")
        identity = exact_hash(opening(system) + text.encode()).hex()
        example = example_from_columns(identity, None, **row)
        made.append((number, Example(identity, turns(system=system) + example.messages)))
    return made


@given(st.one_of(ROWS, ODD_ROWS), st.sampled_from(SPECS))
@settings(deadline=None, max_examples=200)
def test_columns_give_what_rows_give(rows: list[dict[str, Any]], spec: dict[str, str]) -> None:
    data = Data(dataset="samples", **spec)
    expected, dropped = by_row(rows, data)
    mapped = to_columns(RowBlock(rows), ExampleMapper(data))
    assert examples_of(mapped) == expected
    assert sorted(mapped.dropped) == dropped


@given(ROWS, st.sampled_from(SPECS))
@settings(deadline=None, max_examples=100)
def test_columns_of_a_file_give_the_same(rows: list[dict[str, Any]], spec: dict[str, str]) -> None:
    data = Data(dataset="samples", **spec)
    schema = pa.schema([(name, pa.string()) for name in "abc"])
    block = ArrowBlock(pa.RecordBatch.from_pylist(rows, schema))
    expected, dropped = by_row(rows, data)
    mapped = to_columns(block, ExampleMapper(data))
    assert examples_of(mapped) == expected
    assert sorted(mapped.dropped) == dropped


@pytest.mark.parametrize("kind", [pa.string(), pa.int64()])
def test_the_group_of_columns_is_that_of_rows(kind: pa.DataType) -> None:
    data = Data(dataset="samples", **SPECS[0], group="g")
    rows = [{"a": "a", "b": "b", "g": str(n) if kind == pa.string() else n} for n in range(3)]
    rows.append({"a": "a", "b": "b", "g": None})
    schema = pa.schema([("a", pa.string()), ("b", pa.string()), ("g", kind)])
    for block in (RowBlock(rows), ArrowBlock(pa.RecordBatch.from_pylist(rows, schema))):
        mapped = to_columns(block, ExampleMapper(data))
        assert mapped.groups.to_pylist() == ["0", "1", "2"]
        assert mapped.dropped == [(3, "null in 'g'")]


def chat(*messages: tuple[str, Any], keys: tuple[str, str] = ("role", "content")) -> dict[str, Any]:
    return {"m": [dict(zip(keys, message, strict=True)) for message in messages]}


def of(row: dict[str, Any], **fields: Any) -> Example:
    return ExampleMapper(Data(dataset="samples", messages="m", **fields))(row)


def test_every_turn_of_a_dialogue_becomes_a_message() -> None:
    row = chat(
        ("system", "Be brief."), ("user", " Hi. "), ("assistant", "Hello."),
        ("user", "My knee."), ("assistant", "Rest it."),
    )  # fmt: skip
    example = of(row)
    assert example.messages == turns("Hi.", "Hello.", "My knee.", "Rest it.", system="Be brief.")
    assert (example.prompt, example.response) == ("My knee.", "Rest it.")
    assert of(row, system="Be kind.").system == "Be brief."
    assert of(chat(("user", "a"), ("assistant", "b")), system="Be kind.").system == "Be kind."


def test_sharegpt_rows_mean_the_same() -> None:
    said = [("system", "S"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    renamed = {"human": "user", "gpt": "assistant", "system": "system"}
    ours = chat(*[(renamed[role], text) for role, text in said])
    assert of(chat(*said, keys=("from", "value"))) == of(ours)


def test_consecutive_messages_of_a_side_are_joined() -> None:
    example = of(
        chat(("assistant", "Welcome."), ("user", "a"), ("user", "b"), ("assistant", "c"),
             ("user", "bye"))
    )  # fmt: skip
    assert example.messages == turns("a\n\nb", "c")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert of(chat(("user", parts), ("assistant", "c"))).prompt == "a\nb"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no column 'm'"),
        ({"m": "text"}, "no list of messages in 'm'"),
        ({"m": []}, "no answer in 'm'"),
        (chat(("user", "a")), "no answer in 'm'"),
        (chat(("user", ""), ("assistant", "b")), "empty prompt"),
        (chat(("user", "a"), ("assistant", " ")), "empty response"),
        (chat(("user", "a"), ("narrator", "b")), "unknown role 'narrator' in 'm'"),
        (chat(("\ud800", "a")), "unknown role '\\ud800' in 'm'"),
        (chat(("user", None), ("assistant", "b")), "null in 'm'"),
        (chat(("user", "a"), ("system", "b")), "system message inside the dialogue in 'm'"),
        (chat(("user", [{"type": "image"}]), ("assistant", "b")), "content of type 'image' in 'm'"),
        (chat(("user", "\ud800"), ("assistant", "b")), "undecodable text in 'm'"),
    ],
)
def test_a_dialogue_that_cannot_be_used_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowDroppedError) as dropped:
        of(row)
    assert str(dropped.value) == reason


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("My knee hurts.", "my  KNEE hurts", True),
        ("My knee hurts.", "My knee hurt.", False),
        ("Größe", "GRÖSSE", True),
        ("\uff21bc", "abc", True),
        ("a\x1fb", "ab", False),
        ("a_b", "ab", True),
        ("\u4f60\u597d", "\u4f60\u597d!", True),
        ("दिन", "दीन", False),
        ("กา", "ก่า", False),
        ("हिन्दी!", "«हिन्दी»", True),
        ("他吃饭。", "他 吃饭", True),
    ],
)
def test_the_normal_form_is_letters_and_digits(first: str, second: str, same: bool) -> None:
    assert (normal_form(first.encode()) == normal_form(second.encode())) == same
