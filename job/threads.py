"""Threads whose log lines carry the run and the stage of the work that they do."""

import contextvars
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Threads(ThreadPoolExecutor):
    """A pool that runs each call in the context it was submitted from."""

    def submit[T](self, call: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return super().submit(contextvars.copy_context().run, call, *args, **kwargs)


AHEAD = 2
"""Pieces of work that may be done before they are asked for, or after they were given."""


def ahead[T](items: Iterator[T], pool: Threads) -> Iterator[T]:
    """The same items, the next few made by a thread while one is worked on."""
    end = object()
    waiting = deque(pool.submit(next, items, end) for _ in range(AHEAD))
    while (item := waiting.popleft().result()) is not end:
        waiting.append(pool.submit(next, items, end))
        yield item
