"""job.storage.cache_folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def cache_folder(*parts: str) -> Path:
    """A folder for what may be made again: $JOB_CACHE, or `job` in the user's cache folder."""
    if chosen := os.environ.get("JOB_CACHE"):
        return Path(chosen).joinpath(*parts)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches.joinpath("job", *parts)
