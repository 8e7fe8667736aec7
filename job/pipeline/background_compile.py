"""The training step compiled in the background, while the baseline is measured.

On an accelerator compiling it takes longer than many a training. The step is traced before the
baseline begins, since two threads may not trace the same layers; then a thread compiles it. JAX
keeps the program with the function, and training finds it there.
"""

import contextvars
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from job.runtime import logs

if TYPE_CHECKING:
    from job.pipeline.run import Run
    from job.pipeline.train_stage import Prepared


_NAME = "compile-ahead"


class Ahead:
    """A training that is ready to begin, and its step being compiled."""

    def __init__(self, prepared: "Prepared", compile_step: Callable[[], None]) -> None:
        self._prepared = prepared
        self._compile = compile_step
        here = contextvars.copy_context()  # its log lines say the same run and stage
        self._thread = threading.Thread(target=here.run, args=(self._run,), name=_NAME)
        self._thread.start()

    def _run(self) -> None:
        begin = time.monotonic()
        try:
            self._compile()
        except jax.errors.JaxRuntimeError as error:
            # Training meets the same refusal and halves its rows.
            logs.get().info("not compiled ahead", error=str(error).partition("\n")[0])
            return
        logs.get().info("the training step is compiled", seconds=round(time.monotonic() - begin, 1))

    def take(self) -> "Prepared":
        """The training, once its step is compiled."""
        self._thread.join()
        return self._prepared


def compile_ahead(run: "Run") -> None:
    """Begin to compile the training step of a run that is still to be trained.

    It needs processors to spare, which a machine without an accelerator has not.
    """
    if run.environment.platform != "cpu" and "train" not in run.markers:
        begin_ahead(run)


def begin_ahead(run: "Run") -> None:
    """The same, whatever the machine."""
    from job.pipeline.train_stage import prepare

    prepared = prepare(run)
    run.ahead = Ahead(prepared, prepared.trainer.trace_first())


def is_compiling() -> bool:
    """Whether a thread is in the compiler, which an ending process must not wait for."""
    return any(thread.name == _NAME for thread in threading.enumerate())
