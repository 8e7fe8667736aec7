"""Find an adapter in KerasHub's or PEFT's format: in a folder, in a bucket, on the Hub.

Importing this module imports neither JAX nor Keras: callers compare the digests of an adapter
before anything heavy is loaded.
"""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

from job.adapters.keras_format import DESCRIPTION, H5
from job.adapters.peft_format import PEFT_CONFIG, PEFT_WEIGHTS
from job.errors import StageError, UsageError
from job.spec.pinning import NONE, Revisions, pinned
from job.storage.base import Store
from job.storage.hub import SCHEME
from job.storage.locations import open_store

AdapterFormat = Literal["keras", "peft"]
_FILES: dict[AdapterFormat, tuple[str, str]] = {
    "keras": (DESCRIPTION, H5),
    "peft": (PEFT_CONFIG, PEFT_WEIGHTS),
}


class AdapterFiles(NamedTuple):
    """An adapter's format and its two files in a store."""

    kind: AdapterFormat
    store: Store
    folder: str
    """Prefix of the files in the store: empty, or ending with a slash."""

    def digests(self) -> dict[str, str]:
        """Compute the SHA-256 of each file, by name."""
        contents = {name: self.store.read(self.folder + name) for name in _FILES[self.kind]}
        return {name: hashlib.sha256(c or b"").hexdigest() for name, c in contents.items()}

    def fetch(self, folder: Path) -> Path:
        """Download the files into a local folder and return it.

        Raises:
            StageError: a file is missing.
        """
        for name in _FILES[self.kind]:
            if not self.store.download(self.folder + name, folder / name):
                raise StageError(f"{self.store.uri}: the file {self.folder}{name} is missing")
        return folder


def find_adapter(
    uri: str, where: str, subfolder: str = "", revisions: Revisions = NONE
) -> AdapterFiles:
    """Find an adapter's files; those of a Hub repository are downloaded to the cache.

    Args:
        uri: a local folder, a gs:// URI or hf://owner/name.
        where: begins error messages.
        subfolder: prefix of the keys to look at first, ending with a slash.
        revisions: pinned commits of Hub repositories.

    Raises:
        UsageError, SetupError, StageError: there is no adapter, or it cannot be read.
    """
    place = uri
    if uri.startswith(SCHEME):
        repository, commit, cached = pinned("model", uri, None, revisions, "adapters")
        known = [name for names in _FILES.values() for name in names]
        listed = [file for file in repository.files(commit) if file.path in known]
        repository.fetch(commit, listed, cached)
        place = str(cached)
    store = open_store(place)
    for folder in (subfolder, ""):
        for kind, names in _FILES.items():
            if store.stat(folder + names[0]) is not None:
                return AdapterFiles(kind, store, folder)
    raise UsageError(
        f"{where}: {uri} has no adapter: it has neither {subfolder}{DESCRIPTION} nor {DESCRIPTION} "
        f"nor PEFT's {PEFT_CONFIG}"
    )
