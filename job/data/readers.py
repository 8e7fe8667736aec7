"""Read the rows of a file in blocks, in constant memory.

Where a block ends depends only on the file. Bytes of text files that are in no known encoding
become lone surrogates: then the row is dropped and counted, instead of refusing the file.
"""

import codecs
import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from job.data.json_reader import read_json
from job.data.row_blocks import (
    MAX_BYTES,
    MAX_ROW_BYTES,
    MAX_ROWS,
    ArrowBlock,
    Block,
    Row,
    RowBlock,
    open_bytes,
    unicode_encoding,
)
from job.errors import UsageError
from job.runtime import logs
from job.spec.fields import file_format

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_DELIMITERS = (",", ";", "\t")
_FOREIGN = re.compile(r"[\udc80-\udcff]{4}")
"""Bytes that are not UTF-8, more in a row than texts in Windows-1252 have."""

_ENOUGH = 1000
"""Characters beyond ASCII that decide on the encoding of a file."""


def read_blocks(
    path: Path, name: str, skip: int = 0, columns: Sequence[str] | None = None
) -> Iterator[Block]:
    """Yield the blocks of a file.

    Args:
        path: the file.
        name: its name in messages; the extension tells the format.
        skip: the number of rows to leave out, those of the first blocks.
        columns: the columns that are needed; others may be missing from the blocks.

    Raises:
        UsageError: the content does not match the format.
    """
    reader = _READERS[file_format(name) or ""]
    try:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UsageError(
                    f"{name}: is a pointer of Git LFS, not the file it stands for; run "
                    "`git lfs pull` where it was cloned, and copy the file again"
                )
        for block in reader(path, name, columns):
            if skip > 0:
                skip -= len(block)
            else:
                yield block
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{name}: cannot be read: {error}") from None


def _parquet(path: Path, name: str, columns: Sequence[str] | None) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # With a buffer size, Arrow reads page after page instead of complete row groups.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            needed = _needed(file.schema_arrow.names, columns)
            metadata = file.metadata
            groups = range(metadata.num_row_groups)
            size = max(1, sum(metadata.row_group(n).total_byte_size for n in groups))
            rows = max(1, MAX_BYTES * max(1, metadata.num_rows) // size)  # of a block of about 2 MB
            for batch in file.iter_batches(min(MAX_ROWS, rows), columns=needed):
                yield ArrowBlock(batch)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{name}: not a readable Parquet file: {error}") from None


def _arrow(path: Path, name: str, columns: Sequence[str] | None) -> Iterator[Block]:
    """Read a stream of Arrow, which `save_to_disk` of Hugging Face datasets writes."""
    import pyarrow as pa
    import pyarrow.ipc

    try:
        with pa.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            needed = _needed(stream.schema.names, columns)
            for batch in stream:
                for at in range(0, batch.num_rows, MAX_ROWS):
                    yield ArrowBlock(batch.select(needed).slice(at, MAX_ROWS))
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{name}: not a readable stream of Arrow: {error}") from None


def _needed(names: list[str], columns: Sequence[str] | None) -> list[str]:
    """Return those of the columns that a file has; all of its columns if there are none."""
    return [column for column in columns or () if column in names] or names


def _csv(path: Path, name: str) -> Iterator[tuple[Row, int]]:
    """Yield rows under a header, separated by commas, semicolons or tabs, with their lengths.

    A row that ends early has nulls.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    encoding = _csv_encoding(path, name)
    file = io.TextIOWrapper(open_bytes(path, name), encoding, "surrogateescape", newline="")
    try:
        lines = _lines(file, name)
        first = next(lines, "")
        counts = {d: len(next(csv.reader([first], delimiter=d), [])) for d in _DELIMITERS}
        delimiter = max(counts, key=lambda each: counts[each])
        if (encoding, delimiter) != ("utf-8-sig", ","):
            logs.get().info("CSV dialect", file=name, encoding=encoding, delimiter=delimiter)
        reader = csv.DictReader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        header = list(reader.fieldnames or [])
        repeated = [column for column, count in Counter(header).items() if column and count > 1]
        if repeated:
            raise UsageError(
                f"{name}: the header names {repeated[0]!r} more than once; give each column its "
                "own name"
            )
        for row in reader:
            if None in row:
                raise UsageError(
                    f"{name}:{reader.line_num}: more fields than the header names; "
                    f"quote fields that hold {delimiter!r}"
                )
            if len(header) > 1 and all(key == value for key, value in row.items()):
                raise UsageError(
                    f"{name}:{reader.line_num}: the header is repeated; remove this line"
                )
            yield row, sum(map(len, filter(None, row.values())))
    except csv.Error as error:
        raise UsageError(f"{name}: not a readable CSV file: {error}") from None


def _lines(file: io.TextIOWrapper, name: str) -> Iterator[str]:
    """Yield the lines of a file, which may have one without an end."""
    for number in itertools.count(1):
        line = file.readline(MAX_ROW_BYTES)
        if len(line) == MAX_ROW_BYTES:
            raise UsageError(f"{name}:{number}: the line is longer than 128 MB")
        if not line:
            return
        yield line


def _csv_encoding(path: Path, name: str) -> str:
    """Return the encoding of a CSV file: UTF-8, UTF-16, or Windows-1252 (of Excel, for example)."""
    file = open_bytes(path, name)
    piece = bytes(file.read(MAX_BYTES))
    if (encoding := unicode_encoding(piece)) != "utf-8-sig":
        return encoding
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    unicode = odd = 0
    foreign = False
    while piece and unicode + odd < _ENOUGH:
        text = decode(piece)
        if not text.isascii():
            surrogates = len(re.findall(r"[\udc80-\udcff]", text))
            odd += surrogates
            unicode += len(re.findall(r"[^\x00-\x7f]", text)) - surrogates
            foreign = foreign or bool(_FOREIGN.search(text))
        piece = bytes(file.read(MAX_BYTES))
    if unicode >= odd:
        return encoding
    if foreign:
        raise UsageError(f"{name}: neither UTF-8, UTF-16 nor Windows-1252; save it as UTF-8")
    return "cp1252"


def _in_blocks(rows: Iterator[tuple[Row, int]]) -> Iterator[Block]:
    """Yield rows, which come with their numbers of characters, in blocks.

    Those before an error come first: a caller that stops after them never sees the error.
    """
    block: list[Row] = []
    size = 0
    try:
        for row, length in rows:
            block.append(row)
            size += length
            if len(block) == MAX_ROWS or size >= MAX_BYTES:
                yield RowBlock(block)
                block, size = [], 0
    except UsageError:
        if block:
            yield RowBlock(block)
        raise
    if block:
        yield RowBlock(block)


_READERS: dict[str, Callable[[Path, str, Sequence[str] | None], Iterator[Block]]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    **dict.fromkeys(
        (".json", ".jsonl", ".ndjson"), lambda path, name, _: _in_blocks(read_json(path, name))
    ),
    **dict.fromkeys((".csv", ".tsv"), lambda path, name, _: _in_blocks(_csv(path, name))),
}
