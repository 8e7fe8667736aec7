"""A stand-in for Google Cloud that the real `gcloud` talks to.

One service on one port has Cloud Storage (the bucket stand-in), TPU queued resources and Compute
Engine (`cloud_machines`), and the project with its accounts, roles, secrets, images and quotas
(`cloud_admin`). `environment` returns the variables that point gcloud at it. Request bodies are
recorded, so a test can check that no request has a secret.
"""

import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.services.base import Reply, Request, json_reply
from tests.services.bucket import Bucket
from tests.services.cloud_admin import Admin, parse_json
from tests.services.cloud_machines import ApiError, Machine, Machines

PROJECT = "test-project"
BUCKET = "test-bucket"
TOKEN = "access-token-that-nobody-may-see"
_STORAGE = ("/storage/", "/upload/", "/download/", "/resumable/")
_BUCKET = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)")


class Cloud(Bucket):
    """A project with one empty bucket."""

    def __init__(self) -> None:
        super().__init__(BUCKET)
        self.admin = Admin(PROJECT)
        self.machines = Machines(lambda: self.url)
        self.machines.on_exit = self.write_exit
        self.created_buckets: dict[str, dict[str, Any]] = {}
        self.bodies: list[tuple[str, bytes]] = []
        """The "METHOD path" and the body of each request."""
        self._cloud_lock = threading.Lock()

    def environment(self, folder: Path) -> dict[str, str]:
        """Return variables for gcloud, with its configuration and token in `folder`."""
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
        """Serve one call at a time."""
        with self._cloud_lock:
            self.bodies.append((str(request), body))
            try:
                return self._respond(request, body)
            except ApiError as error:
                return error.reply

    def _respond(self, request: Request, body: bytes) -> Reply:
        document = parse_json(body)
        if request.route.startswith(_STORAGE) and not request.route.endswith("/iam"):
            return self._storage(request, body, document)
        for part in (self.machines, self.admin):
            reply = part.respond(request, document)
            if reply is not None:
                return reply
        raise ApiError(404, "NOT_FOUND", f"the stand-in does not serve {request}")

    def _storage(self, request: Request, body: bytes, document: Any) -> Reply:
        match = _BUCKET.fullmatch(request.route)
        if request.method == "POST" and request.route == "/storage/v1/b":
            self.created_buckets[document["name"]] = document
        if match and request.method == "GET" and match["bucket"] in self.created_buckets:
            return json_reply({"name": match["bucket"]} | self.created_buckets[match["bucket"]])
        if match and request.method == "PATCH":
            self._store.require_bucket(unquote(match["bucket"]))
            bucket = self.created_buckets.setdefault(match["bucket"], {})
            bucket.update(document)
            return json_reply({"name": match["bucket"]} | bucket)
        return super().respond(request, body)

    def write_exit(self, machine: Machine, code: int, reason: str = "") -> None:
        """Write the exit mark that a VM writes when its job ends."""
        bucket, _, prefix = machine.metadata["job-control"].removeprefix("gs://").partition("/")
        name = f"{prefix}/marks/exit-{machine.metadata['job-attempt']}-0-{code}"
        self.put(bucket, name, reason.encode())
