"""Threads whose log lines carry the run and the stage of the work that they do."""

import contextvars
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Threads(ThreadPoolExecutor):
    """A pool that runs each call in the context it was submitted from."""

    def submit[T](self, call: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return super().submit(contextvars.copy_context().run, call, *args, **kwargs)


AHEAD = 3
"""Pieces of work that may be done before they are asked for, or after they were given."""


def prefetch[T](items: Iterator[T], pool: Threads) -> Iterator[T]:
    """The same items, the next few made by a thread while one is worked on."""
    end = object()
    waiting = deque(pool.submit(next, items, end) for _ in range(AHEAD))
    while (item := waiting.popleft().result()) is not end:
        waiting.append(pool.submit(next, items, end))
        yield item


def delay[T](items: Iterator[T], by: int) -> Iterator[T]:
    """The same items, each once so many more were made: what they wait for goes on meanwhile.

    Where no more can be made, those that were come before the error.
    """
    waiting: deque[T] = deque()
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > by:
                yield waiting.popleft()
    except Exception:
        yield from waiting
        raise
    yield from waiting


def prefetch_map[A, B](
    call: Callable[[A], B], items: Iterable[A], pool: Threads, most: int
) -> Iterator[B]:
    """What a call gives for each item, in order; at most `most` of them at once."""
    waiting: deque[Future[B]] = deque()
    for item in items:
        waiting.append(pool.submit(call, item))
        if len(waiting) == most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
