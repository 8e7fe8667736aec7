"""A Cloud Storage bucket as a store, by Google's client.

Credentials are the environment's (application default credentials); `STORAGE_EMULATOR_HOST` is
another server that needs none. `JOB_USER_PROJECT` is billed where the bucket's requester pays.
What is tried again, and how soon, is the job's to say (`job.storage.retry`), not the client's.
Every object's CRC32C is compared in both directions, and a write whose answer was lost is told from
one that another made.
"""

import base64
import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from google.api_core.exceptions import GoogleAPICallError, NotFound, PreconditionFailed
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

from job.errors import SetupError, StageError, UsageError
from job.runtime.watchdog import WATCHDOG
from job.storage.base import Stat, check_key
from job.storage.partial import Arriving, Content, bring
from job.storage.retry import TransientError, check_stop, retrying
from job.storage.transfer import first_line, lost_connections, raise_if_transient, timeouts, widen

_CHUNK = 8 * 1024 * 1024
"""Bytes of a request of a resumable upload: a multiple of 256 KiB."""


class GcsStore:
    """A prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str) -> None:
        if not (bucket[:1].isalnum() and bucket[-1:].isalnum()):
            raise UsageError("a gs:// URI needs a bucket: gs://bucket/prefix")
        self._name = bucket
        self._prefix = prefix

    @property
    def uri(self) -> str:
        return f"gs://{self._name}/{self._prefix}".rstrip("/")

    def read(self, key: str) -> bytes | None:
        found = self.read_version(key)
        return None if found is None else found[0]

    def read_version(self, key: str) -> tuple[bytes, str] | None:
        def work() -> tuple[bytes, str]:
            blob = self._blob(key)
            # What the client resumes by itself it does not compare with its checksum.
            content: bytes = blob.download_as_bytes(checksum="crc32c", **_patience())
            if blob.crc32c is None or blob.generation is None:  # emulators leave the headers out
                blob.reload(**_patience())
                if blob.crc32c != crc32c(content):
                    raise TransientError("the content does not have its checksum")
            return content, str(blob.generation)

        return self._call("read", key, work)

    def _found(self, key: str) -> storage.Blob | None:
        """An object with its metadata."""

        def work() -> storage.Blob:
            blob = self._blob(key)
            blob.reload(**_patience())
            if None in (blob.size, blob.generation, blob.crc32c):
                raise TransientError("the reply is not the metadata of an object")
            hex_of(blob.crc32c)  # else it was damaged on the way
            return blob

        return self._call("read", key, work)

    def stat(self, key: str) -> Stat | None:
        found = self._found(key)
        return None if found is None else Stat(found.size, str(found.generation))

    def size(self, key: str) -> int | None:
        found = self.stat(key)
        return None if found is None else found.bytes

    def write(self, key: str, content: bytes) -> None:
        self._write(key, io.BytesIO(content), len(content), crc32c(content))

    def write_if_version(self, key: str, content: bytes | None, version: str | None) -> str | None:
        expected = int(version or 0)
        try:
            if content is None:
                self._delete(key, expected)
                return ""
            file = io.BytesIO(content)
            return self._write(key, file, len(content), crc32c(content), expected)
        except PreconditionFailed:
            # An earlier try may have written it, and its answer been lost.
            found = self.read_version(key)
            return found[1] if found is not None and found[0] == content else None

    def upload(self, path: Path, key: str) -> None:
        try:
            with path.open("rb") as file:
                self._write(key, file, path.stat().st_size, file_crc32c(path))
        except OSError as error:
            raise StageError(f"cannot read {path}: {error.strerror}") from error

    def take(self, path: Path, key: str) -> None:
        self.upload(path, key)
        path.unlink()

    def _write(
        self, key: str, file: BinaryIO, size: int, checksum: str, expected: int | None = None
    ) -> str | None:
        """Write in one request, or a large file in chunks; the new generation.

        The checksum goes with the metadata, so that the service refuses what does not have it.
        The client's own check would delete the object, whoever wrote it, after a damaged reply.
        """

        def work() -> str:
            file.seek(0)
            blob = self._blob(key)
            blob.chunk_size, blob.crc32c = _CHUNK, checksum
            retry = self._policy("write", key) if size > _CHUNK else None
            try:
                blob.upload_from_file(
                    file, size=size, if_generation_match=expected, **_patience(retry), checksum=None
                )
            except GoogleAPICallError as error:
                if _is_lost(error):
                    raise TransientError("the upload was lost, and begins again") from error
                if error.code == 404:
                    raise self._no_bucket() from error
                raise
            if (blob.size, blob.crc32c) != (size, checksum):
                raise TransientError("what was stored is not what was sent")
            return str(blob.generation)

        return self._call("write", key, work)

    def download(self, key: str, path: Path, version: str | None = None) -> bool:
        found = self._found(key)
        if found is None or version not in (None, str(found.generation)):
            return False

        def append(file: Arriving) -> None:
            with _failures():
                self._blob(key, found.generation).download_to_file(
                    file, start=file.have or None, raw_download=True, **_patience(), checksum=None
                )

        path.unlink(missing_ok=True)
        # A partial file is of one generation only, or what is resumed would be of two.
        arriving = path.with_name(f"{path.name}.{found.generation}")
        try:
            with self._refusals("read", key):
                content = Content(found.size, Crc32c, hex_of(found.crc32c))
                bring(f"read {self._place(key)}", arriving, content, append)
        except NotFound:
            return False
        arriving.replace(path)
        return True

    def list(self, prefix: str = "") -> list[str]:
        root = f"{self._prefix}/" if self._prefix else ""

        def listed() -> list[str]:
            patience = _patience(self._policy("list", prefix))
            blobs = self._bucket().list_blobs(prefix=root + prefix, **patience)
            return sorted(str(blob.name).removeprefix(root) for blob in blobs)

        def work() -> list[str]:
            names = listed()
            if names != listed():  # a listing has no checksum
                raise TransientError("two replies to the same request differ")
            return names

        names = self._call("list", prefix, work)
        if names is None:
            raise self._no_bucket()
        return names

    def delete(self, key: str) -> None:
        self._delete(key)

    def _delete(self, key: str, expected: int | None = None) -> None:
        def work() -> None:
            self._blob(key).delete(if_generation_match=expected, **_patience())

        self._call("delete", key, work)

    def _bucket(self) -> storage.Bucket:
        project = os.environ.get("JOB_USER_PROJECT", "").strip() or None
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "").strip().rstrip("/")
        return client(emulator).bucket(self._name, user_project=project)

    def _blob(self, key: str, generation: int | None = None) -> storage.Blob:
        path = f"{self._prefix}/{check_key(key)}".lstrip("/")
        return self._bucket().blob(path, generation=generation)

    def _place(self, key: str) -> str:
        return f"{self.uri}/{key}".rstrip("/")

    def _call[Result](self, action: str, key: str, work: Callable[[], Result]) -> Result | None:
        """The result of `work`, tried again where that may help; None where nothing is found.

        Raises:
            PreconditionFailed, EnvironmentProblem, StageError: see `_refusals`, `retrying`.
        """

        def once() -> Result:
            with _failures():
                return work()

        with contextlib.suppress(NotFound), self._refusals(action, key):
            return retrying(f"{action} {self._place(key)}", once)
        return None

    def _policy(self, action: str, key: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        """What the client takes as `retry` where each of its requests is some progress."""

        def each(request: Callable[[], Any]) -> Callable[[], Any]:
            def once() -> Any:
                check_stop()
                with _failures():
                    reply = request()
                WATCHDOG.beat()
                return reply

            return lambda: retrying(f"{action} {self._place(key)}", once)

        return each

    @contextlib.contextmanager
    def _refusals(self, action: str, key: str) -> Iterator[None]:
        """Turns what the service refuses in this block into errors with the way out.

        Raises:
            NotFound, PreconditionFailed: there is no such object, or another than expected.
            EnvironmentProblem: there is no such bucket, or no permission or credentials for it.
            StageError: anything else.
        """
        try:
            yield
        except GoogleAPICallError as error:
            if _is_of_bucket(error):
                raise self._no_bucket() from error
            if isinstance(error, NotFound | PreconditionFailed):
                raise
            said = first_line(error.response.text) or error.response.reason
            if error.code in (401, 403):
                raise SetupError(
                    f"not allowed to {action} {self._place(key)}: the account in use needs "
                    f"roles/storage.objectUser on the bucket ({error.code}: {said})"
                ) from error
            raise StageError(f"cannot {action} {self._place(key)}: {error.code}: {said}") from error
        except GoogleAuthError as error:
            raise SetupError(
                "no Google Cloud credentials that can be used: run `gcloud auth "
                f"application-default login`, or run on a VM with a service account ({error})"
            ) from error

    def _no_bucket(self) -> SetupError:
        return SetupError(f"there is no bucket gs://{self._name}; create it first")


@functools.cache
def client(emulator: str) -> storage.Client:
    """The connections to Cloud Storage, or to the emulator.

    Raises:
        GoogleAuthError: there are no credentials.
    """
    # Or it asks about each bucket by itself, in the background, for traces that nobody collects.
    os.environ["DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"] = "1"
    endpoint = emulator if "://" in emulator else f"http://{emulator}"
    made = storage.Client(
        project=None, client_options={"api_endpoint": endpoint} if emulator else None
    )
    made._http.trust_env = not emulator
    widen(made._http)
    return made


def _patience(retry: Any = None) -> dict[str, Any]:
    """How long the client waits, and how it tries again: by itself not at all."""
    return {"retry": retry, "timeout": timeouts()}


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Within this block of the client's calls, what may pass is `TransientError`."""
    try:
        with lost_connections():
            yield
    except (GoogleAPICallError, InvalidResponse) as error:
        raise_if_transient(error.response)
        raise
    except GoogleAuthError as error:
        if error.retryable or any(isinstance(cause, TransportError) for cause in error.args):
            raise TransientError(str(error)) from error
        raise
    except (DataCorruption, ValueError) as error:  # ValueError: of JSON, or a chunk kept in part
        raise TransientError(f"the reply is not what it should be: {error}") from error


def _is_of_bucket(error: GoogleAPICallError) -> bool:
    """Whether it is the bucket that is not found, not an object."""
    return error.code == 404 and "bucket does not exist" in error.response.text.lower()


def _is_lost(error: GoogleAPICallError) -> bool:
    """Whether an upload may succeed from its beginning.

    Its session is gone, nothing of a chunk was kept, or what came was damaged on the way.
    """
    if error.code == 400:
        return "crc32c" in error.response.text.lower()
    is_session = error.response.request.method == "PUT"
    return is_session and error.code in (308, 404, 410) and not _is_of_bucket(error)


_PIECE = 1024 * 1024


class Crc32c:
    """A CRC32C in the making, as the checksums of hashlib."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, piece: bytes, /) -> None:
        """Add what follows."""
        import google_crc32c

        self._value = google_crc32c.extend(self._value, piece)

    def hexdigest(self) -> str:
        """The checksum of what was added."""
        return f"{self._value:08x}"


def hex_of(checksum: str) -> str:
    """In hex what the API writes in base64.

    Raises:
        ValueError: it is no such checksum.
    """
    return base64.b64decode(checksum, validate=True).hex()


def crc32c(content: bytes) -> str:
    """The CRC32C of `content` as the API writes it."""
    import google_crc32c

    return base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()


def file_crc32c(path: Path) -> str:
    """The same of a file, read in pieces."""
    import google_crc32c

    value = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            value = google_crc32c.extend(value, piece)
    return base64.b64encode(value.to_bytes(4, "big")).decode()
