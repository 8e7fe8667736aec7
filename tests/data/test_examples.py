"""A row becomes an example or is dropped for a reason that can be counted; nothing in between."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.columnar import to_columns
from job.data.examples import ExampleMapper, RowDroppedError, field_text, fill
from job.data.row_blocks import ArrowBlock, RowBlock
from job.evals.tasks import load_task
from job.spec.schema import Data, MultipleChoiceEval
from tests.conversations import conversation

ROW = {"instruction": "Be brief.", "input": "My knee hurts.", "output": "Rest it."}


def mapper(**fields: Any) -> ExampleMapper:
    given_fields = {"prompt": "{input}", "response": "{output}", **fields}
    return ExampleMapper(Data(dataset="samples", **given_fields))


def test_templates_are_filled_from_the_row() -> None:
    example = mapper(system="{instruction}", prompt="Q: {input} ({age})")(ROW | {"age": 42})
    assert (example.system, example.prompt, example.response) == (
        "Be brief.",
        "Q: My knee hurts. (42)",
        "Rest it.",
    )


def test_space_is_removed_only_around_the_text() -> None:
    example = mapper()({"input": " \n a\n\n b\t", "output": "\tc "})
    assert (example.prompt, example.response) == ("a\n\n b", "c")


def test_without_an_instruction_there_is_none() -> None:
    assert mapper()(ROW).system is None
    assert mapper(system="Be kind.")(ROW).system == "Be kind."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"output": "a"}, "no column 'input'"),
        ({"input": "a"}, "no column 'output'"),
        ({"input": None, "output": "a"}, "null in 'input'"),
        ({"input": "", "output": "a"}, "empty prompt"),
        ({"input": " \n\t", "output": "a"}, "empty prompt"),
        ({"input": "a", "output": "  "}, "empty response"),
        ({"input": "a", "output": ["b"]}, "not text in 'output'"),
        ({"input": {"text": "a"}, "output": "b"}, "not text in 'input'"),
        ({"input": True, "output": "b"}, "not text in 'input'"),
        ({"input": b"a", "output": "b"}, "not text in 'input'"),
        ({"input": "a\ud800", "output": "b"}, "undecodable text in 'input'"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_with_its_reason(
    row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RowDroppedError) as dropped:
        mapper()(row)
    assert str(dropped.value) == reason


def test_one_field_of_several_may_be_empty() -> None:
    both = mapper(prompt="{instruction}\n{input}")
    assert both(ROW | {"input": ""}).prompt == "Be brief."
    with pytest.raises(RowDroppedError, match="empty prompt"):
        both(ROW | {"input": " ", "instruction": ""})


def test_text_around_an_empty_field_is_no_prompt() -> None:
    with pytest.raises(RowDroppedError, match="empty prompt"):
        mapper(prompt="Question: {input}")(ROW | {"input": ""})


@pytest.mark.parametrize(("value", "text"), [("a", "a"), (3, "3"), (1.5, "1.5"), (0, "0")])
def test_text_and_numbers_are_text(value: object, text: str) -> None:
    assert field_text({"a": value}, "a") == text


@given(st.text(), st.text())
def test_braces_and_percent_signs_in_a_row_are_text(first: str, second: str) -> None:
    row = {"a": f"{{b}} {first} {{a.__class__}} %s", "b": f"{{0}} {second}"}
    try:
        filled = fill("[{a}|{b}] {{a}}", row)
    except RowDroppedError:
        return
    assert filled == f"[{row['a']}|{row['b']}] {{a}}"


COLUMNS = [
    "Question Text",
    "问题",
    "a.text",
    "1_q",
    "Frage (de):",
    "a[0]",
    "a!r",
    "a.__class__",
    "-",
]


@pytest.mark.parametrize("name", COLUMNS)
def test_any_column_can_be_named_in_braces(name: str, tmp_path: Path) -> None:
    row = {name: "x", "a": "wrong"}
    template = f"{{{{{name}}}}} {{{name}}}"
    assert fill(template, row) == f"{{{name}}} x"
    data = Data(dataset="samples", prompt=template, response=template, system=template)
    block = ArrowBlock(pa.RecordBatch.from_pylist([row]))
    for rows in (block, RowBlock([row])):
        columns = to_columns(rows, ExampleMapper(data))
        assert columns.batch["prompt"].to_pylist() == [f"{{{name}}} x"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    entry = MultipleChoiceEval(
        name="exam", dataset=str(path), question=template, options=["a", name], answer=name,
        answer_is="text",
    )  # fmt: skip
    (question,) = load_task(entry).questions
    assert (question.text, question.options, question.gold) == (
        f"{{{name}}} x",
        ("wrong", "x"),
        "B",
    )


def test_what_reaches_into_python_is_a_column() -> None:
    with pytest.raises(RowDroppedError, match=r"no column 'a\.__class__'"):
        fill("{a.__class__}", {"a": "x"})


def test_the_id_is_of_the_content_alone() -> None:
    first = mapper(system="{instruction}")(ROW)
    assert first.id == mapper(system="{instruction}")({**ROW, "unused": 1}).id
    same = {"input": "My knee hurts. ", "output": "Rest it."}
    assert first.id == mapper(system="Be brief.")(same).id
    assert len(first.id) == 16
    others = [
        mapper()(ROW),
        mapper(system="{instruction}")(ROW | {"input": "My foot hurts."}),
        mapper(system="{instruction}")(ROW | {"output": "Rest."}),
        mapper(system="{instruction}")(ROW | {"instruction": "Be long."}),
        mapper(prompt="{output}", response="{input}")(ROW),
    ]
    assert len({first.id, *(example.id for example in others)}) == 6


def test_the_id_stays_the_same_from_version_to_version() -> None:
    assert mapper(system="{instruction}")(ROW) == conversation(
        "98acecbe443e0d36", "My knee hurts.", "Rest it.", system="Be brief."
    )
