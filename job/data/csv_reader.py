"""The bytes of text files, and the reader of CSV.

The files may be compressed. Bytes that are no UTF-8 become lone surrogates, so that the row they
are in can be dropped and counted instead of the whole file being refused.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from job.data.blocks import LONGEST_ROW, MAX_BYTES, MAX_ROWS, Block, Place, Row, RowBlock, open_text
from job.errors import UsageError


def read_csv(path: Path, name: str, start: Place, _: Sequence[str] | None) -> Iterator[Block]:
    """Rows under a header; a row that ends early has nulls."""
    csv.field_size_limit(LONGEST_ROW)
    passed = 0

    def lines(file: Any) -> Iterator[str]:
        nonlocal passed
        rest = b""
        while piece := bytes(file.read(MAX_BYTES)):
            *whole, rest = (rest + piece).split(b"\n")
            for raw in whole:
                passed += len(raw) + 1
                yield raw.decode("utf-8", "surrogateescape") + "\n"
        if rest:
            passed += len(rest)
            yield rest.decode("utf-8", "surrogateescape")

    try:
        reader = csv.reader(lines(open_text(path, name, 0)), strict=True)
        header = next(reader, [])
        if header:
            header[0] = header[0].removeprefix("\ufeff")
        if start.offset:
            passed = start.offset
            reader = csv.reader(lines(open_text(path, name, start.offset)), strict=True)
        before = start.line if start.offset else 0
        rows: list[Row] = []
        since = passed
        for fields in reader:
            if not fields:
                continue
            if len(fields) > len(header):
                raise UsageError(
                    f"{name}:{before + reader.line_num}: more fields than the header names; "
                    "quote fields that hold commas"
                )
            row: Row = dict(zip(header, fields, strict=False))
            row.update(dict.fromkeys(header[len(fields) :]))
            rows.append(row)
            if len(rows) == MAX_ROWS or passed - since >= MAX_BYTES:
                since = passed
                yield RowBlock(rows, Place(passed, before + reader.line_num))
                rows = []
        if rows:
            yield RowBlock(rows, Place(passed, before + reader.line_num))
    except csv.Error as error:
        raise UsageError(f"{name}: not a readable CSV file: {error}") from None
