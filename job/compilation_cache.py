"""JAX's persistent compilation cache in a store: programs compiled once, by any machine.

JAX keeps its cache in a local folder. A preempted TPU VM comes back with an empty disk, so for a
`gs://` cache its entries are read from and written to the bucket instead, each when it is
needed. A bucket that fails costs a compilation, never the job.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from job import logs
from job.errors import JobError

if TYPE_CHECKING:
    from job.storage import Store


def use(store: "Store") -> None:
    """Keep compiled programs in the store; must come before anything is compiled."""
    import jax
    from jax._src import compilation_cache
    from jax._src.compilation_cache_interface import CacheInterface

    class StoreCache(CacheInterface):
        """Entries by JAX's own keys, which hold versions, devices and options."""

        _path = Path(store.uri)

        def get(self, key: str) -> bytes | None:
            try:
                return store.read(key)
            except JobError as error:
                logs.get().warning("the compilation cache cannot be read", error=str(error))
                return None

        def put(self, key: str, value: bytes) -> None:
            try:
                if store.size(key) is None:
                    store.write(key, value)
            except JobError as error:
                logs.get().warning("the compilation cache cannot be written", error=str(error))

    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", store.uri)  # type: ignore[no-untyped-call]
    compilation_cache._cache = StoreCache()
