"""Finding an adapter: in a run, in a folder in KerasHub's or PEFT's format, on the Hub.

Importing this module imports neither JAX nor Keras: the inputs of a stage are known before
anything heavy is loaded.
"""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

from job.adapters.keras_format import DESCRIPTION, H5
from job.adapters.peft_format import PEFT_CONFIG, PEFT_WEIGHTS
from job.errors import StageError, UsageError
from job.spec.pinning import Revisions, resolve_commit, revision_key
from job.storage.base import Store
from job.storage.cache_folder import cache_folder
from job.storage.hub import SCHEME, Repository
from job.storage.locations import open_store

_KERAS = (DESCRIPTION, H5)


_PEFT = (PEFT_CONFIG, PEFT_WEIGHTS)


AdapterFormat = Literal["keras", "peft"]


class AdapterFiles(NamedTuple):
    """An adapter's format and its two files in a store."""

    kind: AdapterFormat
    store: Store
    folder: str
    """Prefix of the files in the store: empty, or ending with a slash."""

    @property
    def names(self) -> tuple[str, str]:
        return _KERAS if self.kind == "keras" else _PEFT

    def digests(self) -> dict[str, str]:
        """Compute the SHA-256 of each file, by name."""
        contents = {name: self.store.read(self.folder + name) for name in self.names}
        return {name: hashlib.sha256(c or b"").hexdigest() for name, c in contents.items()}

    def fetch(self, folder: Path) -> Path:
        """Download the files into a local folder and return it.

        Raises:
            StageError: a file is missing.
        """
        for name in self.names:
            if not self.store.download(self.folder + name, folder / name):
                raise StageError(f"{self.store.uri}: the file {self.folder}{name} is missing")
        return folder


def find_adapter(uri: str, where: str) -> AdapterFiles:
    """Find the adapter at a local folder or gs:// URI: a run's, or the folder itself.

    Raises:
        UsageError: there is no adapter; `where` begins the message.
    """
    store = open_store(uri)
    kinds: tuple[tuple[AdapterFormat, str], ...] = (("keras", _KERAS[0]), ("peft", _PEFT[0]))
    for folder in ("adapter/", ""):
        for kind, name in kinds:
            if store.size(folder + name) is not None:
                return AdapterFiles(kind, store, folder)
    raise UsageError(
        f"{where}: {uri} has no adapter: it is neither a trained run (adapter/{_KERAS[0]}) nor a "
        f"folder with {_KERAS[0]} or PEFT's {_PEFT[0]}"
    )


def fetch_adapter(
    uri: str, where: str, revisions: Revisions, folder: Path
) -> tuple[AdapterFormat, Path]:
    """Download an adapter's files.

    Args:
        uri: a local folder, a gs:// URI or hf://owner/name.
        where: begins error messages.
        revisions: pinned commits of Hub repositories.
        folder: where to put the files.

    Returns:
        The adapter's format, and the folder.

    Raises:
        UsageError, SetupError, StageError: there is no adapter, or it cannot be read.
    """
    if uri.startswith(SCHEME):
        name = uri.removeprefix(SCHEME)
        key = revision_key("model", name, None)
        commit = revisions.get(key) or resolve_commit("model", name, None)
        repository = Repository("model", name, None)
        files = [file for file in repository.files(commit) if file.path in (*_KERAS, *_PEFT)]
        cached = cache_folder("adapters", name.replace("/", "--"), commit)
        repository.fetch(commit, files, cached)
        uri = str(cached)
    adapter = find_adapter(uri, where)
    return adapter.kind, adapter.fetch(folder)
