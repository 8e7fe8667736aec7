"""A Cloud Storage bucket as a store, by Google's client.

Credentials are the environment's (application default credentials), never those of `.netrc`;
`STORAGE_EMULATOR_HOST` names another server, which needs none. `JOB_USER_PROJECT` is billed where
the bucket's requester pays. Retries are `job.storage.retry`'s, for every request: the client
resumes uploads and downloads with them. The CRC32C of every object is compared in both directions,
and a write whose reply was lost is told from a write by someone else.
"""

import base64
import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
from google.api_core.exceptions import GoogleAPICallError, NotFound, PreconditionFailed
from google.auth.exceptions import GoogleAuthError
from google.cloud import storage
from requests.adapters import HTTPAdapter

from job.errors import SetupError, StageError, UsageError
from job.storage.base import Stat, check_key
from job.storage.download import Content, download
from job.storage.gcs_errors import is_lost, is_of_bucket, transient_failures, way_out
from job.storage.retry import (
    Attempts,
    TransientError,
    first_line,
    read_reply,
    timeouts,
)

_CHUNK = 8 * 1024 * 1024
"""Bytes of a request of a resumable upload: a multiple of 256 KiB."""

_PIECE = 1024 * 1024
_CONNECTIONS = 16


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
        versioned = self.read_version(key)
        return None if versioned is None else versioned[0]

    def read_version(self, key: str) -> tuple[bytes, str] | None:
        def work() -> tuple[bytes, str]:
            blob = self._blob(key)
            # No `retry`: the client does not verify the checksum of what it resumes.
            content: bytes = blob.download_as_bytes(checksum="crc32c", **_options())
            if blob.generation is None:  # emulators leave the header out
                blob.reload(**_options())
            return content, str(blob.generation)

        return self._call("read", key, work)

    def _metadata(self, key: str) -> storage.Blob | None:
        def work() -> storage.Blob:
            blob = self._blob(key)
            blob.reload(**_options())
            return blob

        return self._call("read", key, work)

    def stat(self, key: str) -> Stat | None:
        blob = self._metadata(key)
        if blob is None:
            return None
        return Stat(blob.size, str(blob.generation), blob.updated.timestamp())

    def write(self, key: str, content: bytes) -> None:
        self._write(key, io.BytesIO(content), len(content))

    def write_if_version(self, key: str, content: bytes | None, version: str | None) -> str | None:
        expected = int(version or 0)
        try:
            if content is None:
                self.delete(key, expected)
                return ""
            return self._write(key, io.BytesIO(content), len(content), expected)
        except PreconditionFailed:
            # An earlier attempt may have written it, and its reply been lost.
            versioned = self.read_version(key)
            return versioned[1] if versioned is not None and versioned[0] == content else None

    def upload(self, path: Path, key: str) -> None:
        try:
            with path.open("rb") as file:
                self._write(key, file, path.stat().st_size)
        except OSError as error:
            raise StageError(f"cannot read {path}: {error.strerror}") from error

    def _write(
        self, key: str, file: BinaryIO, size: int, expected: int | None = None
    ) -> str | None:
        """Write in one request, or a large file in chunks; return the new generation.

        The checksum goes with the metadata, so that the service refuses a damaged upload.
        The client's own check would delete the object, whoever wrote it, after a damaged reply.
        """
        file.seek(0)
        checksum: Any = google_crc32c.Checksum()  # type: ignore[no-untyped-call]
        for _ in checksum.consume(file, _PIECE):
            pass

        def work() -> str:
            file.seek(0)
            blob = self._blob(key)
            blob.chunk_size, blob.crc32c = _CHUNK, base64.b64encode(checksum.digest()).decode()
            retry = _retry(Attempts(f"write {self._key_uri(key)}")) if size > _CHUNK else None
            try:
                blob.upload_from_file(
                    file, size=size, if_generation_match=expected, **_options(retry), checksum=None
                )
            except GoogleAPICallError as error:
                if is_lost(error):
                    raise TransientError("the upload session was lost") from error
                if error.code == 404:
                    raise self._no_bucket() from error
                raise
            return str(blob.generation)

        return self._call("write", key, work)

    def download(self, key: str, path: Path, version: str | None = None) -> bool:
        blob = self._metadata(key)
        if blob is None or version not in (None, str(blob.generation)):
            return False
        what = f"read {self._key_uri(key)}"

        def get(scratch: Path) -> Path:
            attempts = Attempts(what)
            local = scratch / path.name
            with transient_failures(), local.open("wb") as file:
                self._blob(key, blob.generation).download_to_file(
                    _ReportingFile(file, attempts.progress),
                    raw_download=True,
                    checksum=None,
                    **_options(_retry(attempts)),
                )
            return local

        digest = base64.b64decode(blob.crc32c)
        try:
            with self._refusals("read", key):
                download(what, path, Content(blob.size, google_crc32c.Checksum, digest), get)
        except NotFound:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        root = f"{self._prefix}/" if self._prefix else ""

        def work() -> list[str]:
            options = _options(_retry(Attempts(f"list {self._key_uri(prefix)}")))
            blobs = self._bucket().list_blobs(prefix=root + prefix, **options)
            return sorted(str(blob.name).removeprefix(root) for blob in blobs)

        names = self._call("list", prefix, work)
        if names is None:
            raise self._no_bucket()
        return names

    def delete(self, key: str, expected: int | None = None) -> None:
        def work() -> None:
            self._blob(key).delete(if_generation_match=expected, **_options())

        self._call("delete", key, work)

    def _bucket(self) -> storage.Bucket:
        project = os.environ.get("JOB_USER_PROJECT", "").strip() or None
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "").strip().rstrip("/")
        return client(emulator).bucket(self._name, user_project=project)

    def _blob(self, key: str, generation: int | None = None) -> storage.Blob:
        path = f"{self._prefix}/{check_key(key)}".lstrip("/")
        return self._bucket().blob(path, generation=generation)

    def _key_uri(self, key: str) -> str:
        return f"{self.uri}/{key}".rstrip("/")

    def _call[Result](self, action: str, key: str, work: Callable[[], Result]) -> Result | None:
        """Return the result of `work`, retried; None where there is no such object."""

        def once() -> Result:
            with transient_failures():
                return work()

        with contextlib.suppress(NotFound), self._refusals(action, key):
            return Attempts(f"{action} {self._key_uri(key)}").run(once)
        return None

    @contextlib.contextmanager
    def _refusals(self, action: str, key: str) -> Iterator[None]:
        """Turn the service's refusals within this block into errors with the way out.

        NotFound and PreconditionFailed pass: there is no such object, or another than expected.
        """
        try:
            yield
        except GoogleAPICallError as error:
            if is_of_bucket(error):
                raise self._no_bucket() from error
            if isinstance(error, NotFound | PreconditionFailed):
                raise
            reason = first_line(error.response.text) or error.response.reason
            if remedy := way_out(error):
                raise SetupError(
                    f"not allowed to {action} {self._key_uri(key)}: {remedy} "
                    f"({error.code}: {reason})"
                ) from error
            raise StageError(
                f"cannot {action} {self._key_uri(key)}: {error.code}: {reason}"
            ) from error
        except GoogleAuthError as error:
            raise SetupError(
                "no usable Google Cloud credentials: run `gcloud auth "
                f"application-default login`, or run on a VM with a service account ({error})"
            ) from error

    def _no_bucket(self) -> SetupError:
        return SetupError(f"there is no bucket gs://{self._name}; create it first")


type _Retry = Callable[[Callable[[], Any]], Callable[[], Any]]


def _retry(attempts: Attempts) -> _Retry:
    """Return what the client takes as `retry` where each of its requests is progress."""

    def policy(request: Callable[[], Any]) -> Callable[[], Any]:
        def once() -> Any:
            with transient_failures():
                reply = request()
            attempts.progress()
            return reply

        return lambda: attempts.run(once)

    return policy


class _ReportingFile:
    """A file to write to that reports each piece."""

    def __init__(self, file: BinaryIO, report: Callable[[], None]) -> None:
        self._file = file
        self._report = report

    def write(self, piece: bytes) -> int:
        """Write a piece and report it."""
        self._report()
        return self._file.write(piece)


class _BoundedAdapter(HTTPAdapter):
    """Sends requests, and reads replies that are no files with limits of size and time."""

    def send(self, *arguments: Any, **options: Any) -> Any:
        """Return the reply to a request; its body is read already unless it is to be streamed."""
        response = super().send(*arguments, **options | {"stream": True})
        if not options.get("stream"):
            pieces = iter(lambda: response.raw.read1(_PIECE, decode_content=True), b"")
            with response.raw:
                response.raw = io.BytesIO(read_reply(pieces, response.url.partition("?")[0]))
        return response


@functools.cache
def client(emulator: str) -> storage.Client:
    """Return the connections to Cloud Storage, or to an emulator.

    Raises:
        GoogleAuthError: there are no credentials.
    """
    # Otherwise it requests each bucket's metadata in the background, for traces nobody collects.
    os.environ["DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"] = "1"
    endpoint = emulator if "://" in emulator else f"http://{emulator}"
    made = storage.Client(
        project=None, client_options={"api_endpoint": endpoint} if emulator else None
    )
    session = made._http
    session.trust_env = not emulator
    session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
    session.auth = lambda request: request  # without one, `requests` takes that of .netrc
    for scheme in ("http://", "https://"):
        session.mount(scheme, _BoundedAdapter(pool_maxsize=_CONNECTIONS))
    return made


def _options(retry: _Retry | None = None) -> dict[str, Any]:
    """Return the client's options for timeouts and retries: by default it makes no retries."""
    return {"retry": retry, "timeout": timeouts()}
