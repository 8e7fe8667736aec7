"""The project behind the Google Cloud stand-in: everything except machines and objects.

Services, service accounts, roles, IAM policies, secrets, Artifact Registry, quotas and log entries
are stored in dictionaries, as the API's JSON. Policies are not enforced; tests read them to check
the roles that the scripts grant.
"""

import base64
import json
import re
from collections.abc import Callable
from typing import Any

from tests.services.base import Reply, Request, json_reply
from tests.services.cloud_machines import ApiError

_PROJECT = re.compile(r"/v1/projects/(?P<project>[^/:]+)")
_POLICY = re.compile(r"(?P<resource>/.+?)(?::(?P<verb>getIamPolicy|setIamPolicy)|/iam)")
_ORG_POLICY = re.compile(r"/v1/projects/[^/:]+:getEffectiveOrgPolicy")
_SERVICES = re.compile(r"/v1/projects/[^/]+/services(?P<verb>:batchEnable|/[^/]+:enable)?")
_ACCOUNTS = re.compile(r"/v1/projects/[^/]+/serviceAccounts(?:/(?P<name>[^/]+))?")
_ROLES = re.compile(r"/v1/projects/[^/]+/roles(?:/(?P<name>[^/]+))?")
_SECRETS = re.compile(
    r"/v1/(?P<parent>projects/[^/]+)/secrets(?:/(?P<name>[^/:]+))?"
    r"(?P<versions>/versions)?(?:/(?P<version>[^/:]+))?(?::(?P<verb>\w+))?"
)
_REPOSITORIES = re.compile(
    r"/v1/projects/[^/]+/locations/(?P<region>[^/]+)/repositories(?:/(?P<name>[^/]+))?"
)
_TAGS = re.compile(r"/v1/(?P<package>projects/.+/packages/[^/]+)/tags(?:/(?P<tag>[^/]+))?")
_IMAGES = re.compile(r"/v1/projects/.+/(dockerImages|versions|packages)(/.+)?")
_QUOTA = re.compile(
    r"/v1\w*/projects/[^/]+/locations/global/services/[^/]+/quotaInfos/(?P<name>[^/]+)"
)
_LOGS = "/v2/entries:write"


class Admin:
    """The project's resources, which tests read."""

    def __init__(self, project: str) -> None:
        self.project = project
        self.services: set[str] = set()
        self.accounts: dict[str, Any] = {}
        self.roles: dict[str, Any] = {}
        self.policies: dict[str, dict[str, Any]] = {}
        self.secrets: dict[str, list[str]] = {}
        """Values of each secret's versions, oldest first."""
        self.repositories: dict[str, Any] = {}
        self.tags: dict[str, str] = {}
        """Image digests by tag."""
        self.quotas: dict[str, dict[str, int]] = {}
        """Chips by zone for each quota; the zone "" holds the default."""
        self.org_policies: dict[str, Any] = {}
        """The rule of each organization policy, as the API's JSON."""
        self.unknown_members = 0
        """How many changes of a policy fail because the new account is not known yet."""
        self.log_entries: list[dict[str, Any]] = []

    def respond(self, request: Request, body: Any) -> Reply | None:
        """Return the reply, or None if the call is not about these resources."""
        handlers: list[tuple[re.Pattern[str], Callable[[Request, Any, dict[str, str]], Any]]] = [
            (_POLICY, self._policy),
            (_ORG_POLICY, self._org_policy),
            (_SERVICES, self._services),
            (_ACCOUNTS, self._accounts),
            (_ROLES, self._roles),
            (_SECRETS, self._secrets),
            (_TAGS, self._tags),
            (_REPOSITORIES, self._repositories),
            (_IMAGES, self._images),
            (_QUOTA, self._quota),
            (_PROJECT, self._project),
        ]
        if request.route == _LOGS:
            self.log_entries += body["entries"]
            return json_reply({})
        if request.route == "/v1/permissions:queryTestablePermissions":
            return json_reply({})
        for pattern, handler in handlers:
            if match := pattern.fullmatch(request.route):
                return json_reply(handler(request, body, match.groupdict(default="")))
        return None

    def _project(self, request: Request, body: Any, part: dict[str, str]) -> Any:
        if part["project"] != self.project:
            raise ApiError(403, "PERMISSION_DENIED", "The caller does not have permission")
        return {"projectId": self.project, "projectNumber": "1", "lifecycleState": "ACTIVE"}

    def _policy(self, request: Request, body: Any, part: dict[str, str]) -> Any:
        policy = self.policies.setdefault(part["resource"], {"etag": "BwE="})
        if part["verb"] == "setIamPolicy" or request.method == "PUT":
            if self.unknown_members > 0:
                self.unknown_members -= 1
                account = f"job-runner@{self.project}.iam.gserviceaccount.com"
                raise ApiError(
                    400, "INVALID_ARGUMENT", f"Service account {account} does not exist."
                )
            policy["bindings"] = body.get("policy", body).get("bindings", [])
        return policy

    def _org_policy(self, request: Request, body: Any, part: dict[str, str]) -> Any:
        name = body["constraint"]
        return {"constraint": name} | self.org_policies.get(name, {})

    def grants(self, member: str) -> set[tuple[str, str]]:
        """Return (last part of the resource name, role) for each role of a member."""
        return {
            (resource.rpartition("/")[2], binding["role"])
            for resource, policy in self.policies.items()
            for binding in policy.get("bindings", [])
            if member in binding["members"]
        }

    def _services(self, request: Request, body: Any, part: dict[str, str]) -> Any:
        if part["verb"]:
            self.services |= set((body or {}).get("serviceIds", ()))
            if part["verb"].endswith(":enable"):
                self.services.add(part["verb"][1:].partition(":")[0])
            return {"name": "operations/noop.DONE_OPERATION", "done": True, "response": {}}
        return {
            "services": [
                {
                    "name": f"projects/1/services/{name}",
                    "config": {"name": name},
                    "state": "ENABLED",
                }
                for name in sorted(self.services)
            ]
        }

    def _accounts(self, request: Request, body: Any, part: dict[str, str]) -> Any:
        if request.method == "POST":
            email = f"{body['accountId']}@{self.project}.iam.gserviceaccount.com"
            return self._add(self.accounts, email, {"email": email})
        return self._get(self.accounts, part["name"])

    def _roles(self, request: Request, body: Any, part: dict[str, str]) -> Any:
        if request.method == "POST":
            role = body["role"] | {"name": f"projects/{self.project}/roles/{body['roleId']}"}
            return self._add(self.roles, body["roleId"], role)
        if request.method == "PATCH":
            self.roles[part["name"]].update(body)
        return self._get(self.roles, part["name"])

    def _secrets(self, request: Request, body: Any, part: dict[str, str]) -> Any:
        name, parent = part["name"], f"{part['parent']}/secrets"
        if request.method == "POST" and not name:
            name = request.query["secretId"]
            self._add(self.secrets, name, [])
            return {"name": f"{parent}/{name}"}
        if not name:
            return {"secrets": [{"name": f"{parent}/{secret}"} for secret in sorted(self.secrets)]}
        versions = self._get(self.secrets, name)
        if part["verb"] == "addVersion":
            versions.append(base64.b64decode(body["payload"]["data"]).decode())
            return {
                "name": f"{parent}/{name}/versions/{len(versions)}",
                "state": "ENABLED",
                "clientSpecifiedPayloadChecksum": True,
            }
        if part["verb"] == "access":
            if not versions:
                raise ApiError(404, "NOT_FOUND", f"Secret [{parent}/{name}] has no version")
            data = base64.b64encode(versions[-1].encode()).decode()
            return {"name": f"{parent}/{name}/versions/latest", "payload": {"data": data}}
        if part["versions"]:
            return {
                "versions": [
                    {"name": f"{parent}/{name}/versions/{n + 1}", "state": "ENABLED"}
                    for n in range(len(versions))
                ]
            }
        return {"name": f"{parent}/{name}"}

    def _repositories(self, request: Request, body: Any, part: dict[str, str]) -> Any:
        where = f"projects/{self.project}/locations/{part['region']}"
        if request.method == "POST":
            repository = self.add_repository(request.query["repositoryId"], where)
            return {"name": f"{where}/operations/create", "done": True, "response": repository}
        return self._get(self.repositories, part["name"])

    def add_repository(self, name: str, where: str) -> Any:
        """Add a Docker repository."""
        repository = {"name": f"{where}/repositories/{name}", "format": "DOCKER"}
        return self._add(self.repositories, name, repository)

    def _tags(self, request: Request, body: Any, part: dict[str, str]) -> Any:
        tags = {
            tag: {
                "name": f"{part['package']}/tags/{tag}",
                "version": f"{part['package']}/versions/{digest}",
            }
            for tag, digest in self.tags.items()
        }
        return self._get(tags, part["tag"]) if part["tag"] else {"tags": list(tags.values())}

    def _images(self, request: Request, body: Any, part: dict[str, str]) -> Any:
        return {"name": request.route.removeprefix("/v1/")}

    def _quota(self, request: Request, body: Any, part: dict[str, str]) -> Any:
        limits = self._get(self.quotas, part["name"])
        return {
            "quotaId": part["name"],
            "dimensionsInfos": [
                {"details": {"value": str(limit)}}
                | ({"applicableLocations": [zone]} if zone else {})
                for zone, limit in limits.items()
            ],
        }

    @staticmethod
    def _add(resources: dict[str, Any], name: str, value: Any) -> Any:
        if name in resources:
            raise ApiError(409, "ALREADY_EXISTS", f"{name} already exists")
        resources[name] = value
        return value

    @staticmethod
    def _get(resources: dict[str, Any], name: str) -> Any:
        if name not in resources:
            raise ApiError(404, "NOT_FOUND", f"{name} was not found")
        return resources[name]


def parse_json(body: bytes) -> Any:
    """Return a body parsed as JSON, or None if it is not JSON."""
    try:
        return json.loads(body)
    except ValueError:
        return None
