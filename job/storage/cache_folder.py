"""The folder for files that can be downloaded or computed again."""

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Return a folder inside $JOB_CACHE, or inside `job` in the user's cache folder."""
    if chosen := os.environ.get("JOB_CACHE"):
        return Path(chosen).joinpath(*parts)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches.joinpath("job", *parts)
