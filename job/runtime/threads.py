"""Thread pools that keep the log context of their callers, and iterators that prefetch."""

import contextvars
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Threads(ThreadPoolExecutor):
    """A pool that runs each call in the context of its submission: log lines name the run."""

    def submit[T](self, call: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return super().submit(contextvars.copy_context().run, call, *args, **kwargs)


def run_all[T](calls: Iterable[Callable[[], T]], threads: int) -> list[T]:
    """Return the results of calls that run some at a time; an error cancels those that wait."""
    with Threads(threads) as pool:
        waiting = [pool.submit(call) for call in calls]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_PREFETCHED = 3
"""Items that `prefetch` computes before they are requested."""


def prefetch[T](items: Iterator[T], pool: Threads) -> Iterator[T]:
    """Yield the items, with the next few computed by a thread meanwhile."""
    end = object()
    waiting = deque(pool.submit(next, items, end) for _ in range(_PREFETCHED))
    while (item := waiting.popleft().result()) is not end:
        waiting.append(pool.submit(next, items, end))
        yield item


def prefetch_map[A, B](
    call: Callable[[A], B], items: Iterable[A], pool: Threads, most: int
) -> Iterator[B]:
    """Yield the result of `call` for each item, in order, with at most `most` calls at a time.

    If there is an error, the results of earlier items come before it.
    """
    waiting: deque[Future[B]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) == most:
                yield waiting[0].result()
                waiting.popleft()
    except Exception:
        yield from (call.result() for call in waiting)
        raise
    yield from (call.result() for call in waiting)
