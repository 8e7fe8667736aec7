"""Tests of the stores, the lease, the cache and the Hub."""

from job.storage.base import Store


def size_of(store: Store, key: str) -> int | None:
    """The bytes of a file, or None if there is none."""
    stat = store.stat(key)
    return None if stat is None else stat.bytes
