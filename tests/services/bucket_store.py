"""The objects behind the Cloud Storage stand-in, without any HTTP.

`Store` keeps what the JSON API promises about objects: generations that only grow, checksums
that fit the data, preconditions, and listings in order of name with prefixes and pages. The
functions below it give objects their JSON and header forms.

Left out: versions (an overwritten or deleted generation is gone) and changes of metadata, so
that every object's metageneration is 1.
"""

import base64
import hashlib
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import quote

import google_crc32c

from tests.services.base import json_reply

_REASONS = {
    400: "invalid",
    403: "forbidden",
    404: "notFound",
    409: "conflict",
    412: "conditionNotMet",
}
Key = tuple[str, str]  # an object's bucket and name


class StoredObject(NamedTuple):
    """The live generation of an object."""

    data: bytes
    generation: int
    content_type: str
    metadata: Mapping[str, str]
    crc32c: str
    md5: str
    created: str


class ApiError(Exception):
    """A refusal, with the API's JSON body."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        detail = {"message": message, "domain": "global", "reason": _REASONS[status]}
        error = {"code": status, "message": message, "errors": [detail]}
        self.reply = json_reply({"error": error}, status)


class Store:
    """Buckets and their objects; the caller sees to it that calls do not overlap."""

    def __init__(self, buckets: tuple[str, ...]) -> None:
        self.buckets = set(buckets)
        self.objects: dict[Key, StoredObject] = {}
        self.protection = ""
        self._generation = 0

    def require_bucket(self, bucket: str) -> None:
        """Refuse a bucket that was never created."""
        if bucket not in self.buckets:
            raise ApiError(404, "The specified bucket does not exist.")

    def get(self, bucket: str, name: str, generation: str | None = None) -> StoredObject:
        """The live object; with a generation, only if it is that one."""
        self.require_bucket(bucket)
        stored = self.objects.get((bucket, name))
        if stored is None or generation not in (None, str(stored.generation)):
            raise ApiError(404, f"No such object: {bucket}/{name}")
        return stored

    def _check_protection(self, key: Key) -> None:
        if self.protection and key in self.objects:
            raise ApiError(403, f"Object '{'/'.join(key)}' {self.protection}")

    def check(self, query: Mapping[str, str], stored: StoredObject | None, on: str = "if") -> None:
        """Hold a request's preconditions against an object; generation 0 is its absence."""
        for kind, now in (
            ("Generation", stored.generation if stored else 0),
            ("Metageneration", 1 if stored else 0),
        ):
            expected = query.get(f"{on}{kind}Match")
            unexpected = query.get(f"{on}{kind}NotMatch")
            if expected not in (None, str(now)) or unexpected == str(now):
                message = "At least one of the pre-conditions you specified did not hold."
                raise ApiError(412, message)

    def insert(
        self, key: Key, data: bytes, resource: Mapping[str, Any], query: Mapping[str, str]
    ) -> StoredObject:
        """Write a new generation if the preconditions hold and the client's checksums fit."""
        self.check(query, self.objects.get(key))
        self._check_protection(key)
        crc32c = base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        for kind, computed in (("crc32c", crc32c), ("md5Hash", md5)):
            if resource.get(kind, computed) != computed:
                message = (
                    f"Provided {kind} {resource[kind]!r} doesn't match calculated {computed!r}."
                )
                raise ApiError(400, message)
        self._generation = max(self._generation + 1, time.time_ns() // 1000)
        stored = StoredObject(
            data=data,
            generation=self._generation,
            content_type=resource.get("contentType") or "application/octet-stream",
            metadata=resource.get("metadata") or {},
            crc32c=crc32c,
            md5=md5,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        )
        self.objects[key] = stored
        return stored

    def delete(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        """Remove an object if the preconditions hold."""
        self.check(query, self.get(bucket, name, query.get("generation")))
        self._check_protection((bucket, name))
        del self.objects[bucket, name]

    def page(self, url: str, bucket: str, query: Mapping[str, str]) -> dict[str, Any]:
        """One page of a listing: objects, and with a delimiter the prefixes they fold into."""
        self.require_bucket(bucket)
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
        names = (name for owner, name in self.objects if owner == bucket)
        entries = {_fold(name, prefix, delimiter) for name in names if name.startswith(prefix)}
        rest = sorted(entry for entry in entries if entry > after)
        shown = rest[: int(query.get("maxResults", 1000))]
        page: dict[str, Any] = {"kind": "storage#objects"}
        for entry in shown:
            if (bucket, entry) in self.objects and entry == _fold(entry, prefix, delimiter):
                stored = self.objects[bucket, entry]
                page.setdefault("items", []).append(object_resource(url, bucket, entry, stored))
            else:
                page.setdefault("prefixes", []).append(entry)
        if len(shown) < len(rest):
            page["nextPageToken"] = base64.urlsafe_b64encode(shown[-1].encode()).decode()
        return page


def _fold(name: str, prefix: str, delimiter: str) -> str:
    """The name, cut behind the first delimiter that follows the prefix."""
    head, separator, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
    return f"{prefix}{head}{separator}" if separator else name


def bucket_resource(name: str) -> dict[str, str]:
    """A bucket's metadata as the API's JSON gives it."""
    return {
        "kind": "storage#bucket",
        "id": name,
        "name": name,
        "metageneration": "1",
        "location": "US",
        "storageClass": "STANDARD",
    }


def object_resource(url: str, bucket: str, name: str, stored: StoredObject) -> dict[str, Any]:
    """An object's metadata as the API's JSON gives it."""
    path = f"storage/v1/b/{bucket}/o/{quote(name, safe='')}"
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{stored.generation}",
        "selfLink": f"{url}/{path}",
        "mediaLink": f"{url}/download/{path}?generation={stored.generation}&alt=media",
        "name": name,
        "bucket": bucket,
        "generation": str(stored.generation),
        "metageneration": "1",
        "contentType": stored.content_type,
        "storageClass": "STANDARD",
        "size": str(len(stored.data)),
        "md5Hash": stored.md5,
        "crc32c": stored.crc32c,
        "etag": f"{stored.generation}/1",
        "timeCreated": stored.created,
        "updated": stored.created,
        **({"metadata": dict(stored.metadata)} if stored.metadata else {}),
    }


def media_headers(stored: StoredObject) -> dict[str, str]:
    """The headers that come with an object's content."""
    return {
        "Content-Type": stored.content_type,
        "ETag": f'"{stored.generation}/1"',
        "X-Goog-Generation": str(stored.generation),
        "X-Goog-Metageneration": "1",
        "X-Goog-Hash": f"crc32c={stored.crc32c},md5={stored.md5}",
        "X-Goog-Stored-Content-Encoding": "identity",
        "X-Goog-Stored-Content-Length": str(len(stored.data)),
        "X-Goog-Storage-Class": "STANDARD",
    }
