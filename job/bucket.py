"""A Cloud Storage bucket as a store: the JSON API, every transfer resumable and checksummed.

Credentials are the environment's (application default credentials); `STORAGE_EMULATOR_HOST` is
another server that needs none. `JOB_USER_PROJECT` is billed where the bucket's requester pays.
Every object's CRC32C is compared in both directions, and a write whose answer was lost is told
from one that another made.
"""

import functools
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from job.checksums import crc32c, file_crc32c
from job.errors import EnvironmentProblem, StageError, UsageError
from job.retry import Transient, Tries, stop_point
from job.storage import Stat, check_key
from job.transfer import Client, Refused, Reply

_ENDPOINT = "https://storage.googleapis.com"
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_CHUNK = 8 * 1024 * 1024
"""Bytes of a request of a resumable upload: a multiple of 256 KiB."""


class BucketStore:
    """A prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str) -> None:
        if not bucket:
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
        url = self._media(key)
        version = ""

        def check(reply: Reply) -> None:
            nonlocal version
            wanted, version = _hash_of(reply.headers), reply.headers.get("x-goog-generation", "")
            if not wanted or not version:  # emulators leave these headers out
                resource = self._resource(key)
                if resource is None:
                    raise Transient("the object is gone")
                wanted, version = str(resource["crc32c"]), str(resource["generation"])
            if wanted != crc32c(reply.content):
                raise Transient("the content does not have its checksum")

        try:
            reply = self._call("read", key, "GET", url, params={"alt": "media"}, check=check)
        except _NotThere:
            return None
        return reply.content, version

    def stat(self, key: str) -> Stat | None:
        found = self._resource(key)
        return None if found is None else Stat(int(found["size"]), str(found["generation"]))

    def size(self, key: str) -> int | None:
        found = self.stat(key)
        return None if found is None else found.bytes

    def _resource(self, key: str) -> dict[str, Any] | None:
        def check(reply: Reply) -> None:
            _checked_resource(reply.json())

        try:
            reply = self._call("read", key, "GET", self._object(key), check=check)
        except _NotThere:
            return None
        return _checked_resource(reply.json())

    def write(self, key: str, content: bytes) -> None:
        self._write(key, content, None)

    def swap(self, key: str, content: bytes | None, version: str | None) -> str | None:
        expected = {"ifGenerationMatch": version or "0"}
        if content is not None:
            return self._write(key, content, expected)
        try:
            self._call("delete", key, "DELETE", self._object(key), ok=(200, 204), params=expected)
        except _NotThere:
            return ""
        except _Conflict:
            return None
        return ""

    def _write(self, key: str, content: bytes, expected: Mapping[str, str] | None) -> str | None:
        """Write in one request; the new generation, or None if the expected one is gone."""
        checksum = crc32c(content)
        boundary = uuid.uuid4().hex
        resource = json.dumps({"name": self._path(key), "crc32c": checksum})
        head = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
            f"{resource}\r\n"
            f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + content + f"\r\n--{boundary}--".encode()

        def check(reply: Reply) -> None:
            _check_written(reply.json(), len(content), checksum)

        try:
            reply = self._call(
                "write", key, "POST", f"{_endpoint()}/upload/storage/v1/b/{self._name}/o",
                params={"uploadType": "multipart", **(expected or {})}, data=body, check=check,
                headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
            )  # fmt: skip
        except _Conflict:
            # An earlier try may have written it, and its answer been lost.
            found = self.read_version(key)
            return found[1] if found is not None and found[0] == content else None
        except _NotThere:
            raise StageError(f"cannot write {self.uri}/{key}: the upload was lost") from None
        return str(reply.json()["generation"])

    def upload(self, path: Path, key: str) -> None:
        check_key(key)
        try:
            size = path.stat().st_size
            if size <= _CHUNK:
                self.write(key, path.read_bytes())
                return
            checksum = file_crc32c(path)
        except OSError as error:
            raise StageError(f"cannot read {path}: {error.strerror}") from error
        tries = Tries(f"write {self.uri}/{key}")
        while True:
            try:
                resource = self._resumable(path, key, size, checksum, tries)
                _check_written(resource, size, checksum)
                return
            except Transient as error:
                tries.failed(error)

    def _resumable(
        self, path: Path, key: str, size: int, checksum: str, tries: Tries
    ) -> dict[str, Any]:
        """One session of the resumable protocol; a lost answer is asked for again.

        https://cloud.google.com/storage/docs/performing-resumable-uploads
        """
        opened = self._call(
            "write", key, "POST", f"{_endpoint()}/upload/storage/v1/b/{self._name}/o",
            params={"uploadType": "resumable"},
            json={"name": self._path(key), "crc32c": checksum},
            headers={"X-Upload-Content-Length": str(size)},
        )  # fmt: skip
        session = opened.headers.get("location")
        if not session:
            raise Transient("the reply opens no upload")
        sent, known = 0, True
        with path.open("rb") as file:
            while True:
                stop_point()
                if known:
                    file.seek(sent)
                    body = file.read(_CHUNK)
                    part = f"bytes {sent}-{sent + len(body) - 1}/{size}"
                else:
                    body, part = b"", f"bytes */{size}"
                try:
                    reply = self._client().once(
                        "PUT", session, ok=(200, 201, 308), data=body,
                        headers={"Content-Range": part},
                    )  # fmt: skip
                except Transient as error:
                    tries.failed(error)
                    known = False
                    continue
                except Refused as refused:
                    if refused.status in (404, 410):
                        raise Transient("the upload was lost, and begins again") from refused
                    raise self._error("write", key, refused) from refused
                if reply.status != 308:
                    made: dict[str, Any] = reply.json()
                    return made
                have = _persisted(reply)
                if have > sent:
                    tries.progress()
                elif known:
                    tries.failed(Transient("the service kept nothing of what was sent"))
                sent, known = have, True

    def download(self, key: str, path: Path, version: str | None = None) -> bool:
        found = self._resource(key)
        if found is None or version not in (None, str(found["generation"])):
            return False
        checksum = str(found["crc32c"])
        path.unlink(missing_ok=True)
        # A partial file is of one generation only, or what is resumed would be of two.
        arriving = path.with_name(f"{path.name}.{found['generation']}")
        try:
            self._client().download(
                f"read {self.uri}/{key}",
                self._media(key),
                arriving,
                size=int(found["size"]),
                is_right=lambda partial: file_crc32c(partial) == checksum,
                params={**self._params(), "alt": "media", "generation": str(found["generation"])},
            )
        except Refused as refused:
            if refused.status == 404:
                return False
            raise self._error("read", key, refused) from refused
        arriving.replace(path)
        return True

    def list(self, prefix: str = "") -> list[str]:
        root = f"{self._prefix}/" if self._prefix else ""
        names: list[str] = []
        token = ""
        while True:
            page = self._page(prefix, {"prefix": root + prefix}, token)
            names += [str(item["name"]).removeprefix(root) for item in page.get("items", [])]
            token = str(page.get("nextPageToken", ""))
            if not token:
                return sorted(names)

    def _page(self, prefix: str, params: dict[str, str], token: str) -> dict[str, Any]:
        """A page of a listing that came twice the same: it has no checksum."""
        url = f"{_endpoint()}/storage/v1/b/{self._name}/o"
        if token:
            params = {**params, "pageToken": token}
        before: bytes | None = None

        def check(reply: Reply) -> None:
            nonlocal before
            earlier, before = before, reply.content
            reply.json()
            if earlier is not None and earlier != before:
                raise Transient("two replies to the same request differ")

        try:
            for _ in range(2):
                reply = self._call("list", prefix, "GET", url, params=params, check=check)
        except _NotThere:
            raise self._no_bucket() from None
        page: dict[str, Any] = reply.json()
        return page

    def delete(self, key: str) -> None:
        try:
            self._call("delete", key, "DELETE", self._object(key), ok=(200, 204))
        except _NotThere:
            return

    def _path(self, key: str) -> str:
        check_key(key)
        return f"{self._prefix}/{key}" if self._prefix else key

    def _object(self, key: str) -> str:
        return f"{_endpoint()}/storage/v1/b/{self._name}/o/{quote(self._path(key), safe='')}"

    def _media(self, key: str) -> str:
        path = quote(self._path(key), safe="")
        return f"{_endpoint()}/download/storage/v1/b/{self._name}/o/{path}"

    def _params(self) -> dict[str, str]:
        project = os.environ.get("JOB_USER_PROJECT", "").strip()
        return {"userProject": project} if project else {}

    def _client(self) -> Client:
        return client(os.environ.get("STORAGE_EMULATOR_HOST", ""))

    def _call(self, action: str, key: str, method: str, url: str, **arguments: Any) -> Reply:
        params = {**self._params(), **arguments.pop("params", {})}
        place = f"{self.uri}/{key}".rstrip("/")
        try:
            return self._client().call(f"{action} {place}", method, url, params=params, **arguments)
        except Refused as refused:
            if refused.status == 404 and "bucket does not exist" not in refused.text.lower():
                raise _NotThere from refused
            if refused.status == 412:
                raise _Conflict from refused
            raise self._error(action, key, refused) from refused

    def _error(self, action: str, key: str, refused: Refused) -> Exception:
        place = f"{self.uri}/{key}".rstrip("/")
        if refused.status == 404:
            return self._no_bucket()
        if refused.status in (401, 403):
            return EnvironmentProblem(
                f"not allowed to {action} {place}: the account in use needs "
                f"roles/storage.objectUser on the bucket ({refused})"
            )
        return StageError(f"cannot {action} {place}: {refused}")

    def _no_bucket(self) -> EnvironmentProblem:
        return EnvironmentProblem(f"there is no bucket gs://{self._name}; create it first")


class _NotThere(Exception):
    """There is no such object."""


class _Conflict(Exception):
    """A precondition does not hold."""


def _endpoint() -> str:
    host = os.environ.get("STORAGE_EMULATOR_HOST", "").strip().rstrip("/")
    if host and "://" not in host:
        host = f"http://{host}"
    return host or _ENDPOINT


@functools.cache
def client(emulator: str) -> Client:
    """The connections to Cloud Storage, or to the emulator.

    Raises:
        EnvironmentProblem: there are no credentials.
    """
    import requests

    if emulator:
        session = requests.Session()
        session.trust_env = False
        return Client(session, _was_damaged)
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError
    from google.auth.transport.requests import AuthorizedSession

    try:
        credentials, _ = google.auth.default(scopes=[_SCOPE])
    except DefaultCredentialsError as error:
        raise EnvironmentProblem(
            "no Google Cloud credentials: run `gcloud auth application-default login`, or run on "
            "a VM with a service account"
        ) from error
    session = AuthorizedSession(credentials)  # type: ignore[no-untyped-call]
    return Client(session, _was_damaged)


def _was_damaged(status: int, text: str) -> bool:
    """Whether an upload was refused because its checksum does not fit."""
    return status == 400 and "crc32c" in text.lower()


def _hash_of(headers: Mapping[str, str]) -> str | None:
    """The CRC32C of an `X-Goog-Hash` header."""
    for item in headers.get("x-goog-hash", "").split(","):
        name, _, value = item.strip().partition("=")
        if name == "crc32c":
            return value
    return None


def _checked_resource(resource: Any) -> dict[str, Any]:
    """An object's metadata, if it is whole."""
    try:
        int(resource["size"]), int(resource["generation"]), str(resource["crc32c"])
    except (KeyError, TypeError, ValueError):
        raise Transient("the reply is not the metadata of an object") from None
    found: dict[str, Any] = resource
    return found


def _check_written(resource: Any, size: int, checksum: str) -> None:
    found = _checked_resource(resource)
    if int(found["size"]) != size or found["crc32c"] != checksum:
        raise Transient("what was stored is not what was sent")


def _persisted(reply: Reply) -> int:
    """Bytes that a resumable upload has kept."""
    _, _, last = reply.headers.get("range", "").rpartition("-")
    return int(last) + 1 if last.isdigit() else 0
