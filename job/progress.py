"""How far a long piece of work is: a bar on a terminal, and the pulse of the run."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol

from job.pulse import PULSE


class Advance(Protocol):
    """Call with what was done, and figures to show beside it."""

    def __call__(self, done: int = 1, **figures: float | str) -> None: ...


@contextlib.contextmanager
def progress(label: str, total: int | None, start: int = 0) -> Iterator[Advance]:
    """Show work of `total` units (None: not known), of which `start` are done."""
    with PULSE.task(label, total, start), contextlib.ExitStack() as stack:
        bar = stack.enter_context(_bar(label, total, start)) if sys.stdout.isatty() else None

        def advance(done: int = 1, **figures: float | str) -> None:
            PULSE.advance(done, figures)
            if bar:
                bar(done, **figures)

        yield advance


def _shown(figures: dict[str, float | str]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in figures.items()
    )


@contextlib.contextmanager
def _bar(label: str, total: int | None, start: int) -> Iterator[Advance]:
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
