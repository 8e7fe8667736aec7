"""A finished training to use: what `job export` and `job generate` read of a run."""

from pathlib import Path

from job.adapters.keras_format import DESCRIPTION, read_info
from job.adapters.locate import find_adapter
from job.adapters.peft_format import PEFT_CONFIG, PEFT_WEIGHTS
from job.errors import StageError, UsageError
from job.spec.load import parse_spec
from job.spec.pinning import Revisions, model_key
from job.spec.schema import Spec
from job.storage.base import Store, file_sha256
from job.storage.locations import child_uri, open_store


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
        adapter = find_adapter(uri, where, "adapter/")
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
        if f"peft/{PEFT_WEIGHTS}" not in self.info.files:
            raise UsageError(
                f"this run has no PEFT adapter: KerasHub knows no transformers counterpart of "
                f"{self.info.family} (the run's log says why). Use --to merged-keras, or "
                "adapter/adapter.lora.h5"
            )
        self.file(f"peft/{PEFT_CONFIG}")
        return self.file(f"peft/{PEFT_WEIGHTS}").parent
