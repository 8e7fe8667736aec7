"""A stand-in for Cloud Storage: the JSON API over objects held in memory.

It serves the real `google.cloud.storage.Client` when `STORAGE_EMULATOR_HOST` is the service's
`url` as the client is made (the client then needs no credentials). Generations, checksums,
preconditions and the resumable protocol follow the API's documentation, so that a client that
relies on `if_generation_match` or on a checksum meets the real refusal.

Left out: authentication and permissions, object versions, changes of metadata, compose, batches,
the XML API, listing and deleting buckets, cancelling a resumable upload, signed URLs, encryption
keys, gzip transcoding, and partial responses (`fields` is ignored: all fields come). A listing
parameter that is not served gets a 400 instead of a wrong list.
"""

import itertools
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlencode

from tests.services.base import Reply, Request, Service, json_reply, ranged_reply
from tests.services.bucket_store import (
    ApiError,
    Key,
    Store,
    StoredObject,
    bucket_resource,
    media_headers,
    object_resource,
)

GRANULE = 256 * 1024

_ROUTE = re.compile(
    r"(?:/resumable)?(?P<service>|/upload|/download)/storage/v1/b(?:/(?P<bucket>[^/]+))?"
    r"(?P<objects>/o)?(?:/(?P<name>[^/]+))?"
    r"(?:/(?P<copy>rewriteTo|copyTo)/b/(?P<to_bucket>[^/]+)/o/(?P<to_name>[^/]+))?"
)
_CONTENT_RANGE = re.compile(r"bytes (?:\*|(?P<first>\d+)-\d+)/(?P<total>\*|\d+)")
_BOUNDARY = re.compile(r"""boundary=["']?([^"';]+)""")
_LISTING = {
    "prefix", "delimiter", "maxResults", "pageToken", "projection", "fields", "prettyPrint", "alt",
    "userProject",
}  # fmt: skip
_HASH_KEYS = {"crc32c": "crc32c", "md5": "md5Hash"}


@dataclass
class Upload:
    """A resumable session: the bytes persisted so far, and the last reply once complete."""

    key: Key
    resource: dict[str, Any]
    query: dict[str, str]
    data: bytearray = field(default_factory=bytearray)
    completed: Reply | None = None


class Bucket(Service):
    """Cloud Storage with the named buckets, empty at first."""

    def __init__(self, *buckets: str) -> None:
        super().__init__()
        self._store = Store(buckets)
        self._uploads: dict[str, Upload] = {}
        self._upload_ids = itertools.count(1)
        self._storage_lock = threading.Lock()

    @property
    def objects(self) -> dict[Key, StoredObject]:
        """The live objects: `objects[bucket, name]` is a tuple `(data, generation, ...)`."""
        return self._store.objects

    @property
    def buckets(self) -> set[str]:
        """The names of the buckets."""
        return self._store.buckets

    def protect(self, why: str) -> None:
        """Let no object be replaced or deleted from now on, as a retention policy or a hold does.

        `why` follows the object's name in the refusal.
        """
        self._store.protection = why

    def put(self, bucket: str, name: str, data: bytes, **resource: Any) -> int:
        """Store an object from the test's side, its bucket included; returns the generation.

        `resource` takes the API's names: `contentType`, `metadata`.
        """
        with self._storage_lock:
            self.buckets.add(bucket)
            return self._store.insert((bucket, name), data, resource, {}).generation

    def names(self, bucket: str) -> list[str]:
        """The names of a bucket's objects, in order."""
        with self._storage_lock:
            return sorted(name for owner, name in self.objects if owner == bucket)

    def respond(self, request: Request, body: bytes) -> Reply:
        """Serve one call; calls take turns, so that a precondition still holds at the write."""
        match = _ROUTE.fullmatch(request.route)
        if match is None:
            return Reply(404, b"Not Found")
        part = {name: unquote(value) for name, value in match.groupdict(default="").items()}
        with self._storage_lock:
            try:
                return self._route(request, body, part)
            except ApiError as error:
                return error.reply

    def _route(self, request: Request, body: bytes, part: dict[str, str]) -> Reply:
        bucket, name = part["bucket"], part["name"]
        match (part["service"], request.method, part["objects"], bool(name)):
            case ("", "POST", "", False) if not bucket:
                return self._create_bucket(json.loads(body)["name"])
            case ("", "GET", "", False) if bucket:
                self._store.require_bucket(bucket)
                return json_reply(bucket_resource(bucket))
            case ("", "GET", "/o", False):
                return self._list(request, bucket)
            case ("" | "/download", "GET", "/o", True) if not part["copy"]:
                return self._read(request, bucket, name)
            case ("", "DELETE", "/o", True) if not part["copy"]:
                self._store.delete(bucket, name, request.query)
                return Reply(204)
            case ("", "POST", "/o", True) if part["copy"]:
                return self._copy(request, body, part)
            case ("/upload", "POST", "/o", False):
                self._store.require_bucket(bucket)
                return self._upload(request, body, bucket)
            case ("/upload", "PUT", "/o", False):
                return self._resume(request, body)
        raise ApiError(400, f"the stand-in does not serve {request}")

    def _create_bucket(self, name: str) -> Reply:
        if name in self.buckets:
            raise ApiError(409, "The requested bucket name is not available.")
        self.buckets.add(name)
        return json_reply(bucket_resource(name))

    def _list(self, request: Request, bucket: str) -> Reply:
        if unknown := request.query.keys() - _LISTING:
            raise ApiError(400, f"the stand-in does not serve {sorted(unknown)} in a listing")
        return json_reply(self._store.page(self.url, bucket, request.query))

    def _read(self, request: Request, bucket: str, name: str) -> Reply:
        """An object's metadata, or with `alt=media` its content."""
        stored = self._store.get(bucket, name, request.query.get("generation"))
        if request.query.get("ifGenerationNotMatch") == str(stored.generation):
            return Reply(304)
        self._store.check(request.query, stored)
        if request.query.get("alt") != "media":
            return json_reply(object_resource(self.url, bucket, name, stored))
        return ranged_reply(stored.data, request.headers.get("Range"), media_headers(stored))

    def _copy(self, request: Request, body: bytes, part: dict[str, str]) -> Reply:
        """Copy an object in one call, with the metadata given or else the source's."""
        query = request.query
        source = self._store.get(part["bucket"], part["name"], query.get("sourceGeneration"))
        self._store.check(query, source, on="ifSource")
        self._store.require_bucket(part["to_bucket"])
        unchanged = {"contentType": source.content_type, "metadata": source.metadata}
        resource = unchanged | {
            key: value for key, value in json.loads(body or b"{}").items() if value
        }
        stored = self._store.insert(
            (part["to_bucket"], part["to_name"]), source.data, resource, query
        )
        copied = object_resource(self.url, part["to_bucket"], part["to_name"], stored)
        if part["copy"] == "copyTo":
            return json_reply(copied)
        size = str(len(source.data))
        return json_reply(
            {
                "kind": "storage#rewriteResponse",
                "totalBytesRewritten": size,
                "objectSize": size,
                "done": True,
                "resource": copied,
            }
        )

    def _insert(
        self, key: Key, data: bytes, resource: Mapping[str, Any], query: Mapping[str, str]
    ) -> Reply:
        stored = self._store.insert(key, data, resource, query)
        return json_reply(object_resource(self.url, *key, stored))

    def _upload(self, request: Request, body: bytes, bucket: str) -> Reply:
        """Accept a complete media or multipart upload, or open a resumable session."""
        query, content_type = request.query, request.headers.get("Content-Type", "")
        match query.get("uploadType"):
            case "media":
                resource = {"contentType": content_type, **_hashes(request)}
                return self._insert((bucket, query["name"]), body, resource, query)
            case "multipart":
                resource, data = _parse_multipart(content_type, body)
                return self._insert((bucket, _name(query, resource)), data, resource, query)
            case "resumable":
                resource = json.loads(body or b"{}")
                resource.setdefault("contentType", request.headers.get("X-Upload-Content-Type"))
                return self._open_session(request, (bucket, _name(query, resource)), resource)
        raise ApiError(400, "Invalid uploadType.")

    def _open_session(self, request: Request, key: Key, resource: dict[str, Any]) -> Reply:
        self._store.check(request.query, self.objects.get(key))
        upload_id = f"upload-{next(self._upload_ids)}"
        self._uploads[upload_id] = Upload(key, resource, request.query)
        query = urlencode({"uploadType": "resumable", "name": key[1], "upload_id": upload_id})
        return Reply(200, b"", {"Location": f"{self.url}{request.route}?{query}"})

    def _resume(self, request: Request, body: bytes) -> Reply:
        """Persist a chunk of a session, or tell how far it is; the last byte makes the object."""
        upload = self._uploads.get(request.query.get("upload_id", ""))
        if upload is None:
            raise ApiError(404, "The resumable upload does not exist.")
        if upload.completed:
            return upload.completed
        default = f"bytes 0-{len(body)}/{len(body)}"
        match = _CONTENT_RANGE.fullmatch(request.headers.get("Content-Range", default))
        if match is None or int(match["first"] or 0) > len(upload.data):
            raise ApiError(400, "Invalid Content-Range.")
        fresh = body[len(upload.data) - int(match["first"] or 0) :]
        if match["total"] == str(len(upload.data) + len(fresh)):
            resource = upload.resource | _hashes(request)
            data = bytes(upload.data + fresh)
            upload.completed = self._insert(upload.key, data, resource, upload.query)
            return upload.completed
        upload.data += fresh[: len(fresh) // GRANULE * GRANULE]
        return Reply(308, b"", {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {})


def _name(query: Mapping[str, str], resource: Mapping[str, Any]) -> str:
    """The name of the object to write, from the query or else from its metadata."""
    return query.get("name") or str(resource["name"])


def _hashes(request: Request) -> dict[str, str]:
    """The checksums of an `X-Goog-Hash` header, under the names that metadata gives them."""
    items = ",".join(request.headers.get_all("X-Goog-Hash", [])).split(",")
    pairs = (item.strip().partition("=") for item in items)
    return {_HASH_KEYS[kind]: value for kind, _, value in pairs if kind in _HASH_KEYS}


def _parse_multipart(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """The metadata and the content that a `multipart/related` body carries."""
    match = _BOUNDARY.search(content_type)
    if match is None:
        raise ApiError(400, "Missing multipart boundary.")
    # Clients end lines with CRLF, gcloud with LF alone.
    end = b"\r\n" if b"\r\n--" + match[1].encode() in body else b"\n"
    parts = (end + body).split(end + b"--" + match[1].encode())
    _, _, resource = parts[1].partition(end * 2)
    headers, _, data = parts[2].partition(end * 2)
    kind = re.search(rb"(?i)content-type:\s*([^\r\n]+)", headers)
    given: dict[str, Any] = json.loads(resource)
    if kind:
        given.setdefault("contentType", kind[1].decode())
    return given, data
