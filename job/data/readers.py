"""Rows of a file, block after block, in constant memory, from any place a block ended.

Where a block ends depends on the rows alone, not on where reading began: what is read in parts
is what would have been read at once.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from job.data.blocks import BEGIN, CODECS, MAX_BYTES, MAX_ROWS, ArrowBlock, Block, Place
from job.data.csv_reader import read_csv
from job.data.json_reader import read_json, read_json_lines
from job.errors import UsageError


def format_of(name: str) -> str | None:
    """The ending that tells the format of a file: `.json` of `a/B.JSON.gz`; None if unknown."""
    path = Path(name.lower())
    if path.suffix in CODECS:
        path = path.with_suffix("")
        return path.suffix if path.suffix in _READERS and path.suffix != ".parquet" else None
    return path.suffix if path.suffix in _READERS else None


def read_blocks(
    path: Path, name: str, start: Place = BEGIN, columns: Sequence[str] | None = None
) -> Iterator[Block]:
    """The blocks of a file from `start` on.

    Args:
        path: where the file is.
        name: what it is called; its ending tells the format, and messages name it.
        columns: those that are needed; others may be left out.

    Raises:
        UsageError: the file is not what its name says.
    """
    reader = _READERS[format_of(name) or ""]
    try:
        yield from reader(path, name, start, columns)
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error}") from None


def _parquet(path: Path, name: str, start: Place, columns: Sequence[str] | None) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A buffer of its own makes Arrow read page after page instead of whole row groups.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            known = file.schema_arrow.names
            wanted = [column for column in columns if column in known] if columns else known
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
            waiting: list[Any] = []
            held = 0
            for batch in file.iter_batches(size, row_groups=groups, columns=wanted or known):
                passed = min(skip, batch.num_rows)
                skip -= passed
                waiting.append(batch.slice(passed))
                held += batch.num_rows - passed
                while held >= size:
                    whole = pa.concat_batches(waiting)
                    line, held = line + size, held - size
                    waiting = [whole.slice(size)]
                    yield ArrowBlock(whole.slice(0, size), Place(0, line))
            if held:
                yield ArrowBlock(pa.concat_batches(waiting), Place(0, line + held))
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{name}: not a readable Parquet file: {error}") from None


def _block_rows(metadata: Any) -> int:
    """Rows of a block of about 2 MB: the same for a file wherever reading begins."""
    total = sum(metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups))
    return int(min(MAX_ROWS, max(1, MAX_BYTES * max(1, metadata.num_rows) // max(1, total))))


Reader = Callable[[Path, str, Place, Sequence[str] | None], Iterator[Block]]


_READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".parquet": _parquet,
}
