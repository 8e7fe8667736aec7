"""How far a long piece of work is: a bar on a terminal, a heartbeat line in a log."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from job import logs

HEARTBEAT_SECONDS = 30.0


class Advance(Protocol):
    """Call with what was done, and figures to show beside it."""

    def __call__(self, done: int = 1, **figures: float | str) -> None: ...


@contextlib.contextmanager
def progress(label: str, total: int, start: int = 0) -> Iterator[Advance]:
    """Show work of `total` units, of which `start` are done."""
    if sys.stdout.isatty():
        with _bar(label, total, start) as advance:
            yield advance
    else:
        yield _heartbeat(label, total, start)


def _shown(figures: dict[str, float | str]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in figures.items()
    )


@contextlib.contextmanager
def _bar(label: str, total: int, start: int) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("         {task.description:<10}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(label, total=total, completed=start, figures="")

        def advance(done: int = 1, **figures: float | str) -> None:
            bar.update(task, advance=done, figures=_shown(figures))

        yield advance


def _heartbeat(label: str, total: int, start: int) -> Advance:
    done_so_far = start
    last = time.monotonic()

    def advance(done: int = 1, **figures: float | str) -> None:
        nonlocal done_so_far, last
        done_so_far += done
        if time.monotonic() - last >= HEARTBEAT_SECONDS:
            last = time.monotonic()
            logs.get().info("working", task=label, done=done_so_far, of=total, **figures)

    return advance
