"""Iterators that compute ahead."""

from collections.abc import Iterator

import pytest

from job.runtime.threads import Threads, prefetch_map


@pytest.mark.parametrize("failing", range(6))
def test_what_follows_a_failing_call_is_not_yielded(failing: int) -> None:
    def call(number: int) -> int:
        if number == failing:
            raise ValueError(number)
        return number

    results: list[int] = []
    with Threads(3) as pool, pytest.raises(ValueError, match=str(failing)):
        results.extend(prefetch_map(call, range(6), pool, 3))
    assert results == list(range(failing))


@pytest.mark.parametrize("read", range(6))
def test_items_read_before_an_error_are_yielded_before_it(read: int) -> None:
    def items() -> Iterator[int]:
        yield from range(read)
        raise OSError("unreadable")

    results: list[int] = []
    with Threads(3) as pool, pytest.raises(OSError, match="unreadable"):
        results.extend(prefetch_map(abs, items(), pool, 3))
    assert results == list(range(read))
