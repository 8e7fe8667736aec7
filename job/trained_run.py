"""A run that was trained, wherever it is: its spec, its adapter, each file with its checksum."""

from pathlib import Path

from job.adapter_source import find_adapter
from job.errors import StageError, UsageError
from job.model.adapter_info import DESCRIPTION, read_info
from job.revisions import Revisions, model_key
from job.spec import Spec
from job.spec_loading import parse_spec
from job.storage import Store, child_uri, file_sha256, open_store


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
        from job.model.peft import CONFIG, MODEL

        if f"peft/{MODEL}" not in self.info.files:
            raise UsageError(
                f"this run has no adapter for transformers: {self.info.family} has no counterpart "
                "there that KerasHub knows; its log says what is missing. Use --to merged-keras, "
                "or adapter/adapter.lora.h5"
            )
        self.file(f"peft/{CONFIG}")
        return self.file(f"peft/{MODEL}").parent
