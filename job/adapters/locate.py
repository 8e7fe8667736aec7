"""Where an adapter may be: in a run, in a folder of ours or of PEFT's, in a bucket, on the Hub.

Light on purpose: what a stage depends on is found out before anything heavy is imported.
"""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

from job.adapters.keras_format import DESCRIPTION, read_info
from job.errors import StageError, UsageError
from job.spec.load import parse_spec
from job.spec.pinning import Revisions, model_key, resolve_commit, revision_key
from job.spec.schema import Spec
from job.storage.base import Store, file_sha256
from job.storage.cache_folder import cache_folder
from job.storage.hub import Repository
from job.storage.locations import child_uri, open_store

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


class TrainedRun:
    """The run: its spec, its adapter's description, checked copies of its files."""

    def __init__(self, uri: str, work: Path, where: str) -> None:
        """Args: work: a scratch folder for the copies; where: begins messages.

        Raises:
            UsageError: there is no such run, or it has no adapter.
            StageError: its description is damaged.
        """
        found = find_adapter(uri, where)
        if found.kind != "ours" or found.folder != "adapter/":
            raise UsageError(f"{uri} is not a run; a run is <output>/<run-id>")
        self.store: Store = open_store(uri)
        self._work = work
        self.spec = self._read_spec(uri)
        self.store.download(f"adapter/{DESCRIPTION}", work / DESCRIPTION)
        self.info = read_info(work / DESCRIPTION)

    def _read_spec(self, uri: str) -> Spec:
        text = self.store.read("spec.yaml")
        if text is None:
            raise UsageError(f"{uri} has no spec.yaml: it is not a run")
        return parse_spec(text.decode("utf-8", "replace"), child_uri(uri, "spec.yaml"))

    @property
    def revisions(self) -> Revisions:
        """The commit of the model that the adapter is of."""
        key = model_key(self.spec)
        return {key: self.info.revision} if key and self.info.revision else {}

    def file(self, name: str) -> Path:
        """A copy of a file of the adapter, with the right checksum."""
        path = self._work / name
        if not self.store.download(f"adapter/{name}", path):
            raise StageError(f"{self.store.uri}: the file adapter/{name} is missing")
        if file_sha256(path) != self.info.files.get(name):
            raise StageError(
                f"{self.store.uri}: adapter/{name} does not have the checksum in adapter.json: "
                "it is cut off or changed"
            )
        return path

    def peft(self) -> Path:
        """The folder with the adapter in PEFT's format."""
        from job.adapters.peft_format import CONFIG, MODEL

        if f"peft/{MODEL}" not in self.info.files:
            raise UsageError(
                f"this run has no adapter for transformers: {self.info.family} has no counterpart "
                "there that KerasHub knows; its log says what is missing. Use --to merged-keras, "
                "or adapter/adapter.lora.h5"
            )
        self.file(f"peft/{CONFIG}")
        return self.file(f"peft/{MODEL}").parent
