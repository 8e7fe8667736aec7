"""The watchdog: a progress line every half minute, and the end of a job that is stalled.

It has its own thread, so that it logs while the main thread is in the compiler, too. Work reports
progress with `beat`: a step, a batch, a block of rows, a piece of a transfer. Without any for
`runtime.stall_minutes`, the stacks of all threads are logged and the job ends, so that nobody pays
for a machine that does nothing.
"""

import contextlib
import contextvars
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from job.errors import EXIT_STAGE
from job.runtime import logs

LINE_SECONDS = 30.0
_TICK_SECONDS = 1.0
_FRAMES = 20
"""Innermost frames of each thread to log."""


class Watchdog:
    """The current work of the process, and the time since its last progress."""

    def __init__(self) -> None:
        self.stage = ""
        self._label = ""
        self._done = self._logged = 0
        self._total: int | None = None
        self._figures: dict[str, float | str] = {}
        self._idle = 0.0

    def beat(self) -> None:
        """Report progress."""
        self._idle = 0.0

    @contextlib.contextmanager
    def task(self, label: str, total: int | None, start: int) -> Iterator[None]:
        """Describe this work in the log lines within this block."""
        outer = self._label, self._total, self._done, self._logged, self._figures
        self._label, self._total, self._done, self._logged = label, total, start, start
        self._figures = {}
        self.beat()
        try:
            yield
        finally:
            self._label, self._total, self._done, self._logged, self._figures = outer
            self.beat()

    def advance(self, done: int = 1, **figures: float | str) -> None:
        """Add finished units of the work, with figures for the log lines."""
        self._done += done
        self._figures = figures
        self.beat()

    @contextlib.contextmanager
    def watching(
        self, stall_minutes: float | None, leave: Callable[[int, str], None]
    ) -> Iterator[None]:
        """Watch the process within this block.

        Args:
            leave: ends the process with an exit code and a message.
        """
        ended = threading.Event()
        context = contextvars.copy_context()  # so that log lines name the run
        arguments = (self._watch, ended, stall_minutes, leave)
        thread = threading.Thread(target=context.run, args=arguments, name="watchdog", daemon=True)
        self.beat()
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _watch(
        self,
        ended: threading.Event,
        stall_minutes: float | None,
        leave: Callable[[int, str], None],
    ) -> None:
        file = os.environ.get("JOB_HEARTBEAT_FILE")
        line_due = time.monotonic() + LINE_SECONDS
        while not ended.wait(_TICK_SECONDS):
            # Counted in ticks: a machine or container that was paused has not stalled.
            self._idle += _TICK_SECONDS
            if file:
                _touch(Path(file), self._idle)
            if time.monotonic() >= line_due:
                line_due = time.monotonic() + LINE_SECONDS
                self._log_progress()
            if stall_minutes is not None and self._idle >= stall_minutes * 60:
                logs.get().error("stalled", stage=self.stage, stacks=stacks())
                leave(
                    EXIT_STAGE,
                    f"{self._label or self.stage}: no progress for {stall_minutes:g} minutes "
                    "(runtime.stall_minutes); the log has the stacks of all threads; "
                    "run the same command to resume",
                )

    def _log_progress(self) -> None:
        if sys.stdout.isatty():  # there is a progress bar
            return
        line: dict[str, float | str | None] = {"stage": self.stage}
        if self._label:
            rate = (self._done - self._logged) / LINE_SECONDS
            self._logged = self._done
            line |= {"task": self._label, "done": self._done, "of": self._total}
            line |= {"per_second": round(rate, 3), **self._figures}
        logs.get().info("working", **line, idle_seconds=round(self._idle))


def _touch(file: Path, idle: float) -> None:
    """Set the file's time to that of the last beat."""
    with contextlib.suppress(OSError):
        file.touch()
        then = time.time() - idle
        os.utime(file, (then, then))


def stacks() -> str:
    """Return the stack of every thread."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame, _FRAMES))}"
        for number, frame in sys._current_frames().items()
    )


WATCHDOG = Watchdog()
"""The watchdog of this process, which has one main thread and one stage at a time."""


Advance = Callable[..., None]
"""A function to call with the finished units, and figures to show next to them."""


@contextlib.contextmanager
def progress(label: str, total: int | None, start: int = 0) -> Iterator[Advance]:
    """Show the progress of work of `total` units (None: unknown), of which `start` are done."""
    with WATCHDOG.task(label, total, start):
        if not sys.stdout.isatty():
            yield WATCHDOG.advance
            return
        from rich import progress as rich

        columns = (
            rich.TextColumn("         {task.description:<10}"),
            rich.BarColumn(bar_width=30),
            rich.MofNCompleteColumn(),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[figures]}"),
        )
        with rich.Progress(*columns, transient=True) as bar:
            task = bar.add_task(label, total=total, completed=start, figures="")

            def advance(done: int = 1, **figures: float | str) -> None:
                WATCHDOG.advance(done, **figures)
                bar.update(task, advance=done, figures=_format(figures))

            yield advance


def _format(figures: dict[str, float | str]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in figures.items()
    )
