"""Where an adapter may be: in a run, in a folder of ours or of PEFT's, in a bucket, on the Hub.

Light on purpose: what a stage depends on is found out before anything heavy is imported.
"""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

from job.errors import StageError, UsageError
from job.hub import Repository
from job.revisions import Revisions, resolve_commit, revision_key
from job.runtime import cache_folder
from job.storage import Store, open_store

_OURS = ("adapter.json", "adapter.lora.h5")
_PEFT = ("adapter_config.json", "adapter_model.safetensors")
_HUB = "hf://"


class AdapterFiles(NamedTuple):
    """An adapter that was found: its format, and its two files in a store."""

    kind: Literal["ours", "peft"]
    store: Store
    folder: str
    """Their place in the store: empty, or with a slash at its end."""

    @property
    def names(self) -> tuple[str, str]:
        return _OURS if self.kind == "ours" else _PEFT

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file."""
        contents = {name: self.store.read(self.folder + name) for name in self.names}
        return {name: hashlib.sha256(c or b"").hexdigest() for name, c in contents.items()}

    def fetch(self, folder: Path) -> Path:
        """The folder with local copies of the files.

        Raises:
            StageError: one of them is missing.
        """
        for name in self.names:
            if not self.store.download(self.folder + name, folder / name):
                raise StageError(f"{self.store.uri}: the file {self.folder}{name} is missing")
        return folder


def find_adapter(uri: str, where: str) -> AdapterFiles:
    """The adapter at a local folder or gs:// URI: that of a run, or the folder itself.

    Raises:
        UsageError: there is none; `where` begins the message.
    """
    store = open_store(uri)
    kinds: tuple[tuple[Literal["ours", "peft"], str], ...] = (
        ("ours", _OURS[0]),
        ("peft", _PEFT[0]),
    )
    for folder in ("adapter/", ""):
        for kind, name in kinds:
            if store.size(folder + name) is not None:
                return AdapterFiles(kind, store, folder)
    raise UsageError(
        f"{where}: {uri} has no adapter: it is neither a run that was trained "
        f"(adapter/{_OURS[0]}) nor a folder with {_OURS[0]} or PEFT's {_PEFT[0]}"
    )


def fetch_adapter(uri: str, where: str, revisions: Revisions, folder: Path) -> tuple[str, Path]:
    """Local copies of an adapter's files.

    Returns:
        `ours` or `peft`, and the folder they are in.

    Raises:
        UsageError, EnvironmentProblem, StageError: there is none, or it cannot be read.
    """
    if uri.startswith(_HUB):
        name = uri.removeprefix(_HUB)
        key = revision_key("model", name, None)
        commit = revisions.get(key) or resolve_commit("model", name, None)
        repository = Repository("model", name, None)
        files = [file for file in repository.files(commit) if file.path in (*_OURS, *_PEFT)]
        here = cache_folder("adapters", name.replace("/", "--"), commit)
        repository.fetch(commit, files, here)
        uri = str(here)
    found = find_adapter(uri, where)
    return found.kind, found.fetch(folder)
