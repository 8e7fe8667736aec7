"""A finished training to use: what `job export` and `job generate` read of a run."""

from pathlib import Path

from job.adapters.keras_format import CHAT_TEMPLATE, DESCRIPTION, H5, read_info
from job.adapters.locate import find_adapter
from job.adapters.peft_format import PEFT_CONFIG, PEFT_WEIGHTS
from job.errors import StageError, UsageError
from job.pipeline.layout import ADAPTER, PEFT_ADAPTER, SPEC
from job.spec.load import parse_spec
from job.spec.pinning import Revisions, hub_key
from job.spec.schema import Model
from job.storage.base import Store, file_sha256
from job.storage.locations import child_uri, open_store


class TrainedRun:
    """A trained run: its spec, its adapter's description, verified copies of its files."""

    def __init__(self, uri: str, work: Path, where: str) -> None:
        """Open a run, with a scratch folder for copies; error messages begin with `where`.

        Raises:
            UsageError: the run does not exist, or it has no adapter.
            StageError: its description is damaged.
        """
        adapter = find_adapter(uri, where, ADAPTER)
        if adapter.kind != "keras" or adapter.folder != ADAPTER:
            raise UsageError(f"{uri} is not a run; a run is <output>/<run-id>")
        self.store: Store = open_store(uri)
        self._work = work
        text = self.store.read(SPEC)
        if text is None:
            raise UsageError(f"{uri} has no {SPEC}: it is not a run")
        self.spec = parse_spec(text.decode("utf-8", "replace"), child_uri(uri, SPEC))
        self.store.download(ADAPTER + DESCRIPTION, work / DESCRIPTION)
        self.info = read_info(work / DESCRIPTION, child_uri(uri, ADAPTER + DESCRIPTION))

    @property
    def revisions(self) -> Revisions:
        """The commit of the adapter's base model."""
        key = hub_key("model", self.spec.model.preset, self.spec.model.revision)
        return {key: self.info.revision} if key and self.info.revision else {}

    def file(self, name: str) -> Path:
        """Download a file of the adapter and verify its checksum.

        Raises:
            StageError: it is missing or damaged.
        """
        path = self._work / name
        if not self.store.download(ADAPTER + name, path):
            raise StageError(f"{self.store.uri}: the file {ADAPTER}{name} is missing")
        if file_sha256(path) != self.info.files.get(name):
            raise StageError(
                f"{self.store.uri}: {ADAPTER}{name} does not have the checksum in {DESCRIPTION}: "
                "it was truncated or modified"
            )
        return path

    def model(self) -> Model:
        """Return the model section of the spec, with the chat template that training used."""
        if CHAT_TEMPLATE not in self.info.files:  # a run of an earlier version
            return self.spec.model
        path = str(self.file(CHAT_TEMPLATE))
        return self.spec.model.model_copy(update={"chat_template": path})

    def peft(self) -> Path:
        """Download the adapter in PEFT's format and return its folder.

        Raises:
            UsageError: the run has no such adapter.
            StageError: its files are missing or damaged.
        """
        if PEFT_ADAPTER + PEFT_WEIGHTS not in self.info.files:
            raise UsageError(
                f"this run has no PEFT adapter: KerasHub knows no transformers counterpart of "
                f"{self.info.family} (the run's log says why). Use --to merged-keras, or "
                f"{ADAPTER}{H5}"
            )
        self.file(PEFT_ADAPTER + PEFT_CONFIG)
        return self.file(PEFT_ADAPTER + PEFT_WEIGHTS).parent
