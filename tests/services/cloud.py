"""A stand-in for Google Cloud, which the real `gcloud` is pointed at.

One service on one port: Cloud Storage (the bucket stand-in), TPU queued resources and Compute
Engine (`cloud_machines`), and the project with its accounts, roles, secrets, images and quotas
(`cloud_admin`). `environment` holds what makes gcloud use it and nothing else. Bodies of
requests are kept, so that a test can look for what must not be in any of them.
"""

import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.services.base import Reply, Request, json_reply
from tests.services.bucket import Bucket
from tests.services.cloud_admin import Admin, parsed
from tests.services.cloud_machines import Machine, Machines, Refused

PROJECT = "test-project"
BUCKET = "test-bucket"
TOKEN = "access-token-that-nobody-may-see"

_STORAGE = ("/storage/", "/upload/", "/download/", "/resumable/")
_BUCKET = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)")


class Cloud(Bucket):
    """A project; empty but for a bucket."""

    def __init__(self) -> None:
        super().__init__(BUCKET)
        self.admin = Admin(PROJECT)
        self.machines = Machines(lambda: self.url)
        self.machines.on_exit = self.write_exit
        self.buckets_as_made: dict[str, dict[str, Any]] = {}
        self.bodies: list[tuple[str, bytes]] = []
        """Each request's "METHOD path" and its body."""
        self._cloud_lock = threading.Lock()

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables for gcloud; its configuration and its token lie in `folder`."""
        token = folder / "token"
        token.write_text(TOKEN)
        services = (
            "TPU", "IAM", "SECRETMANAGER", "ARTIFACTREGISTRY", "CLOUDRESOURCEMANAGER",
            "SERVICEUSAGE", "CLOUDQUOTAS", "CLOUDBUILD", "LOGGING",
        )  # fmt: skip
        overrides = {f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{name}": f"{self.url}/" for name in services}
        return {
            **overrides,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{self.url}/compute/v1/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{self.url}/storage/v1/",
            "CLOUDSDK_CONFIG": str(folder / "gcloud"),
            "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(token),
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
            "STORAGE_EMULATOR_HOST": self.url,
        }

    def respond(self, request: Request, body: bytes) -> Reply:
        """Serve one call; calls take turns."""
        with self._cloud_lock:
            self.bodies.append((str(request), body))
            try:
                return self._answer(request, body)
            except Refused as refused:
                return refused.reply

    def _answer(self, request: Request, body: bytes) -> Reply:
        given = parsed(body)
        if request.route.startswith(_STORAGE) and not request.route.endswith("/iam"):
            return self._storage(request, body, given)
        for part in (self.machines, self.admin):
            reply = part.respond(request, given)
            if reply is not None:
                return reply
        raise Refused(404, "NOT_FOUND", f"the stand-in does not serve {request}")

    def _storage(self, request: Request, body: bytes, given: Any) -> Reply:
        found = _BUCKET.fullmatch(request.route)
        if request.method == "POST" and request.route == "/storage/v1/b":
            self.buckets_as_made[given["name"]] = given
        if found and request.method == "PATCH":
            self._store.require_bucket(unquote(found["bucket"]))
            made = self.buckets_as_made.setdefault(found["bucket"], {})
            made.update(given)
            return json_reply({"name": found["bucket"]} | made)
        return super().respond(request, body)

    def write_exit(self, machine: Machine, code: int, reason: str = "") -> None:
        """What a VM leaves in the bucket when its job ends."""
        bucket, _, prefix = machine.metadata["job-control"].removeprefix("gs://").partition("/")
        name = f"{prefix}/marks/exit-{machine.metadata['job-attempt']}-0-{code}"
        self.put(bucket, name, reason.encode())
