"""Read the rows of a file in blocks, in constant memory, from the end of any earlier block.

Where a block ends depends only on the rows, not on where reading began, so reading a file in
parts gives the same blocks as reading it in one pass. Bytes of text files that are not UTF-8
become lone surrogates: then the row is dropped and counted, instead of refusing the file.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from job.data.json_reader import read_json, read_json_lines
from job.data.row_blocks import (
    BEGIN,
    CODECS,
    MAX_BYTES,
    MAX_ROW_BYTES,
    MAX_ROWS,
    ArrowBlock,
    Block,
    FilePosition,
    Row,
    RowBlock,
    open_text,
)
from job.errors import UsageError


def format_of(name: str) -> str | None:
    """Return the extension that tells a file's format (`.json` of `a/B.JSON.gz`), or None."""
    path = Path(name.lower())
    if path.suffix in CODECS:
        path = path.with_suffix("")
        return path.suffix if path.suffix in _READERS and path.suffix != ".parquet" else None
    return path.suffix if path.suffix in _READERS else None


def read_blocks(
    path: Path, name: str, start: FilePosition = BEGIN, columns: Sequence[str] | None = None
) -> Iterator[Block]:
    """Yield the blocks of a file.

    Args:
        path: the file.
        name: its name in messages; the extension tells the format.
        start: the position to begin at, the `end` of an earlier block.
        columns: the columns that are needed; others may be missing from the blocks.

    Raises:
        UsageError: the content does not match the format.
    """
    reader = _READERS[format_of(name) or ""]
    try:
        yield from reader(path, name, start, columns)
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error}") from None


def _parquet(
    path: Path, name: str, start: FilePosition, columns: Sequence[str] | None
) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # With a buffer size, Arrow reads page after page instead of complete row groups.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            needed = [column for column in columns if column in names] if columns else names
            size = _block_rows(file.metadata)
            line = 0
            groups: list[int] = []
            for number in range(file.num_row_groups):
                count = file.metadata.row_group(number).num_rows
                if line + count <= start.line and not groups:
                    line += count
                else:
                    groups.append(number)
            skip, line = start.line - line, start.line
            pending: list[Any] = []
            rows = 0
            for batch in file.iter_batches(size, row_groups=groups, columns=needed or names):
                skipped = min(skip, batch.num_rows)
                skip -= skipped
                pending.append(batch.slice(skipped))
                rows += batch.num_rows - skipped
                while rows >= size:
                    merged = pa.concat_batches(pending)
                    line, rows = line + size, rows - size
                    pending = [merged.slice(size)]
                    yield ArrowBlock(merged.slice(0, size), FilePosition(0, line))
            if rows:
                yield ArrowBlock(pa.concat_batches(pending), FilePosition(0, line + rows))
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{name}: not a readable Parquet file: {error}") from None


def _block_rows(metadata: Any) -> int:
    """Return the number of rows in a block of about 2 MB, wherever reading begins."""
    total = sum(metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups))
    return int(min(MAX_ROWS, max(1, MAX_BYTES * max(1, metadata.num_rows) // max(1, total))))


def _csv(path: Path, name: str, start: FilePosition, _: Sequence[str] | None) -> Iterator[Block]:
    """Read rows under a header; a row that ends early has nulls."""
    csv.field_size_limit(MAX_ROW_BYTES)
    offset = 0

    def lines(file: Any) -> Iterator[str]:
        nonlocal offset
        rest = b""
        while piece := bytes(file.read(MAX_BYTES)):
            *complete, rest = (rest + piece).split(b"\n")
            for raw in complete:
                offset += len(raw) + 1
                yield raw.decode("utf-8", "surrogateescape") + "\n"
        if rest:
            offset += len(rest)
            yield rest.decode("utf-8", "surrogateescape")

    try:
        reader = csv.reader(lines(open_text(path, name, 0)), strict=True)
        header = next(reader, [])
        if header:
            header[0] = header[0].removeprefix("\ufeff")
        if start.offset:
            offset = start.offset
            reader = csv.reader(lines(open_text(path, name, start.offset)), strict=True)
        lines_before = start.line if start.offset else 0
        rows: list[Row] = []
        block_start = offset
        for fields in reader:
            if not fields:
                continue
            if len(fields) > len(header):
                raise UsageError(
                    f"{name}:{lines_before + reader.line_num}: more fields than the header names; "
                    "quote fields that hold commas"
                )
            row: Row = dict(zip(header, fields, strict=False))
            row.update(dict.fromkeys(header[len(fields) :]))
            rows.append(row)
            if len(rows) == MAX_ROWS or offset - block_start >= MAX_BYTES:
                block_start = offset
                yield RowBlock(rows, FilePosition(offset, lines_before + reader.line_num))
                rows = []
        if rows:
            yield RowBlock(rows, FilePosition(offset, lines_before + reader.line_num))
    except csv.Error as error:
        raise UsageError(f"{name}: not a readable CSV file: {error}") from None


Reader = Callable[[Path, str, FilePosition, Sequence[str] | None], Iterator[Block]]

_READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
