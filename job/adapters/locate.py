"""Finding an adapter: in a run, in a folder in KerasHub's or PEFT's format, on the Hub.

Importing this module imports neither JAX nor Keras: the inputs of a stage are known before
anything heavy is loaded.
"""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

from job.adapters.keras_format import DESCRIPTION, H5, read_info
from job.errors import StageError, UsageError
from job.spec.load import parse_spec
from job.spec.pinning import Revisions, model_key, resolve_commit, revision_key
from job.spec.schema import Spec
from job.storage.base import Store, file_sha256
from job.storage.cache_folder import cache_folder
from job.storage.hub import Repository
from job.storage.locations import child_uri, open_store

_KERAS = (DESCRIPTION, H5)


_PEFT = ("adapter_config.json", "adapter_model.safetensors")


_HUB = "hf://"


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
    if uri.startswith(_HUB):
        name = uri.removeprefix(_HUB)
        key = revision_key("model", name, None)
        commit = revisions.get(key) or resolve_commit("model", name, None)
        repository = Repository("model", name, None)
        files = [file for file in repository.files(commit) if file.path in (*_KERAS, *_PEFT)]
        cached = cache_folder("adapters", name.replace("/", "--"), commit)
        repository.fetch(commit, files, cached)
        uri = str(cached)
    adapter = find_adapter(uri, where)
    return adapter.kind, adapter.fetch(folder)


class TrainedRun:
    """A trained run: its spec, its adapter's description, verified copies of its files."""

    def __init__(self, uri: str, work: Path, where: str) -> None:
        """Open a run.

        Args:
            uri: the run.
            work: a scratch folder for copies.
            where: begins error messages.

        Raises:
            UsageError: the run does not exist, or it has no adapter.
            StageError: its description is damaged.
        """
        adapter = find_adapter(uri, where)
        if adapter.kind != "keras" or adapter.folder != "adapter/":
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
        """The commit of the adapter's base model."""
        key = model_key(self.spec)
        return {key: self.info.revision} if key and self.info.revision else {}

    def file(self, name: str) -> Path:
        """Download a file of the adapter and verify its checksum.

        Raises:
            StageError: it is missing or damaged.
        """
        path = self._work / name
        if not self.store.download(f"adapter/{name}", path):
            raise StageError(f"{self.store.uri}: the file adapter/{name} is missing")
        if file_sha256(path) != self.info.files.get(name):
            raise StageError(
                f"{self.store.uri}: adapter/{name} does not have the checksum in adapter.json: "
                "it is truncated or was changed"
            )
        return path

    def peft(self) -> Path:
        """Download the adapter in PEFT's format and return its folder.

        Raises:
            UsageError: the run has no such adapter.
            StageError: its files are missing or damaged.
        """
        from job.adapters.peft_format import CONFIG, MODEL

        if f"peft/{MODEL}" not in self.info.files:
            raise UsageError(
                f"this run has no PEFT adapter: KerasHub knows no transformers counterpart of "
                f"{self.info.family} (the run's log says why). Use --to merged-keras, or "
                "adapter/adapter.lora.h5"
            )
        self.file(f"peft/{CONFIG}")
        return self.file(f"peft/{MODEL}").parent
