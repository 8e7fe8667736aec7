"""The machines behind the Google Cloud stand-in: TPU queued resources and Compute Engine VMs.

A machine's life is a list of states. Each read moves it one state forward, so a test decides what
a watcher sees, without a clock. Besides the API's states, a life may have `exit N` (the job exits
with that code, and its exit mark appears in the bucket) and `gone` (the machine disappears).
`refusals` holds the errors for create requests, by zone. Every existing machine counts as alive,
including suspended machines and machines being deleted.

Not included: nodes without a queued resource, reservations, networks, disks and SSH.
"""

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.services.base import Reply, Request, json_reply

QUEUED_LIFE = ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
GCE_LIFE = ("PROVISIONING", "STAGING", "RUNNING")
UP = ("ACTIVE", "RUNNING")
_TPU_ZONE = r"/v[12]/projects/[^/]+/locations/(?P<zone>[^/]+)"
_GCE_ZONE = r"/compute/v1/projects/[^/]+/zones/(?P<zone>[^/]+)"
_QUEUED = re.compile(_TPU_ZONE + r"/queuedResources(?:/(?P<name>[^/]+))?")
_NODES = re.compile(_TPU_ZONE + r"/nodes")
_TYPES = re.compile(_TPU_ZONE + r"/acceleratorTypes")
_GCE = re.compile(_GCE_ZONE + r"/instances(?:/(?P<name>[^/]+))?")
_GCE_ALL = re.compile(r"/compute/v1/projects/[^/]+/aggregated/instances")
_NETWORK = re.compile(r"/compute/v1/projects/[^/]+/global/networks/(?P<name>[^/]+)")
_MACHINE_TYPE = re.compile(_GCE_ZONE + r"/machineTypes/(?P<name>[^/]+)")
_ZONE = re.compile(_GCE_ZONE)
_OPERATION = re.compile(_GCE_ZONE + r"/operations/(?P<name>[^/]+)(?:/wait)?")

_ERRORS = {
    "capacity": (429, "RESOURCE_EXHAUSTED", "There is no more capacity in the zone {zone}"),
    "quota": (
        429,
        "RESOURCE_EXHAUSTED",
        "Quota limit 'TPUV5sPreemptibleLitepodServingPerProjectPerZoneForTPUAPI' has been "
        "exceeded. Limit: 0 in zone {zone}.",
    ),
    "denied": (403, "PERMISSION_DENIED", "Permission 'tpu.nodes.create' denied on the zone {zone}"),
    "rate": (
        429,
        "RESOURCE_EXHAUSTED",
        "Quota exceeded for quota metric 'Mutate requests' and limit 'Mutate requests per minute'",
    ),
    "invalid": (400, "INVALID_ARGUMENT", "Runtime version is not valid for the zone {zone}"),
    "policy": (
        400,
        "FAILED_PRECONDITION",
        "Constraint constraints/compute.vmExternalIpAccess violated for project 1. Add instance "
        "projects/test-project/zones/{zone}/instances/t1v-n-1-w-0 to the constraint to use "
        "external IP with it.",
    ),
    "unknown": (409, "ABORTED", "The operation was aborted in {zone}."),
}


@dataclass
class Machine:
    """A machine: its create request and its current state."""

    kind: str
    zone: str
    name: str
    order: dict[str, Any]
    """The body of the create request."""
    life: list[str]
    state: str = ""
    problem: str = ""
    deleting: int | None = None
    """Reads until the machine is gone."""
    created: float = field(default_factory=time.time)
    booted: bool = False

    @property
    def node(self) -> dict[str, Any]:
        """The part of the create request that has labels and metadata."""
        if self.kind == "gce":
            return self.order
        node: dict[str, Any] = self.order["tpu"]["nodeSpec"][0]["node"]
        return node

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.node.get("labels", {}))

    @property
    def metadata(self) -> dict[str, str]:
        metadata = self.node.get("metadata", {})
        if self.kind == "gce":
            return {item["key"]: item["value"] for item in metadata["items"]}
        return dict(metadata)

    @property
    def spot(self) -> bool:
        if self.kind == "gce":
            return bool(self.order["scheduling"].get("provisioningModel") == "SPOT")
        return "spot" in self.order


class ApiError(Exception):
    """An error response of the API."""

    def __init__(self, code: int, status: str, message: str) -> None:
        super().__init__(message)
        error = {
            "code": code,
            "status": status,
            "message": message,
            "errors": [{"message": message, "reason": status}],
        }
        self.reply = json_reply({"error": error}, code)


class Machines:
    """All machines of the project. The caller serializes the calls."""

    def __init__(self, url: Callable[[], str]) -> None:
        self._url = url
        self.alive: dict[tuple[str, str, str], Machine] = {}
        self.history: list[Machine] = []
        self.most_alive: Counter[str] = Counter()
        """The largest number of machines that each run had at once, by run label."""
        self.lives: list[tuple[str, ...]] = []
        """Lives of the next machines; machines after them get the default life."""
        self.refusals: dict[str, list[str]] = {}
        """Errors for the next create requests in a zone: capacity, quota, denied, ..."""
        self.offered: dict[str, set[str]] = {}
        """Accelerator and machine types by zone; an unlisted zone offers all."""
        self.networks = {"default"}
        self.delete_looks = 0
        self.on_boot: Callable[[Machine], None] = lambda machine: None
        self.on_exit: Callable[[Machine, int], None] = lambda machine, code: None
        self.on_gone: Callable[[Machine], None] = lambda machine: None

    def respond(self, request: Request, body: Any) -> Reply | None:
        """Return the reply, or None if the call is not about machines."""
        route = request.route
        if match := _QUEUED.fullmatch(route):
            return self._calls("queued", request, body, match["zone"], match["name"])
        if match := _GCE.fullmatch(route):
            return self._calls("gce", request, body, match["zone"], match["name"])
        if _GCE_ALL.fullmatch(route):
            return self._all_instances()
        if _NODES.fullmatch(route):
            return json_reply({"nodes": []})
        if match := _TYPES.fullmatch(route):
            offered = sorted(self._offered(match["zone"]))
            where = f"projects/p/locations/{match['zone']}/acceleratorTypes"
            return json_reply(
                {"acceleratorTypes": [{"name": f"{where}/{n}", "type": n} for n in offered]}
            )
        if match := _MACHINE_TYPE.fullmatch(route):
            if match["name"] not in self._offered(match["zone"]):
                raise ApiError(404, "NOT_FOUND", f"The resource '{route}' was not found")
            return json_reply({"name": match["name"], "zone": match["zone"]})
        if match := _NETWORK.fullmatch(route):
            if match["name"] not in self.networks:
                raise ApiError(404, "NOT_FOUND", f"The resource '{route}' was not found")
            return json_reply({"name": match["name"]})
        if match := _OPERATION.fullmatch(route):
            return json_reply(self._operation(route, match["name"]))
        if match := _ZONE.fullmatch(route):
            return json_reply({"name": match["zone"], "status": "UP"})
        return None

    def _offered(self, zone: str) -> set[str]:
        return self.offered.get(zone, {"v5litepod-8", "v5litepod-16", "ct6e-standard-8t"})

    def _calls(self, kind: str, request: Request, body: Any, zone: str, name: str | None) -> Reply:
        match (request.method, name):
            case ("POST", None):
                name = request.query.get("queuedResourceId") or body["name"]
                return self._create(kind, zone, str(name), body)
            case ("GET", None):
                machines = [m for m in list(self.alive.values()) if m.kind == kind]
                listed = [m for m in machines if zone in ("-", m.zone) and self._advance(m)]
                return json_reply({"queuedResources": [self._resource(m) for m in listed]})
            case ("GET", str()):
                machine = self._find(kind, zone, name)
                if not self._advance(machine):
                    raise ApiError(404, "NOT_FOUND", f"Resource '{name}' was not found")
                return json_reply(self._resource(machine))
            case ("DELETE", str()):
                machine = self._find(kind, zone, name)
                if machine.deleting is None:
                    machine.deleting = self.delete_looks
                    machine.state = "STOPPING" if kind == "gce" else "DELETING"
                return json_reply(self._start_operation(kind, zone, f"delete-{name}"))
        raise ApiError(400, "INVALID_ARGUMENT", f"the stand-in does not serve {request}")

    def _find(self, kind: str, zone: str, name: str) -> Machine:
        machine = self.alive.get((kind, zone, name))
        if machine is None:
            raise ApiError(404, "NOT_FOUND", f"Resource '{zone}/{name}' was not found")
        return machine

    def _create(self, kind: str, zone: str, name: str, order: dict[str, Any]) -> Reply:
        if (kind, zone, name) in self.alive:
            raise ApiError(409, "ALREADY_EXISTS", f"Resource '{name}' already exists")
        if refusals := self.refusals.get(zone):
            refusal = refusals.pop(0)
            code, status, message = _ERRORS[refusal]
            if kind == "gce" and refusal == "capacity":
                return json_reply(self._failed_operation(zone, f"create-{name}"))
            raise ApiError(code, status, message.format(zone=zone))
        if "/machineTypes/ct5lp" in order.get("machineType", ""):
            machine_type = order["machineType"].rpartition("/")[2]
            message = f"This user agent is not allowed to use the machine type {machine_type}."
            raise ApiError(403, "FORBIDDEN", message)
        self.order(kind, zone, name, order)
        return json_reply(self._start_operation(kind, zone, f"create-{name}"))

    def order(self, kind: str, zone: str, name: str, order: dict[str, Any]) -> None:
        """Create a machine."""
        life = self.lives.pop(0) if self.lives else (QUEUED_LIFE if kind == "queued" else GCE_LIFE)
        machine = Machine(kind, zone, name, order, list(life))
        machine.state = machine.life.pop(0)
        self.alive[kind, zone, name] = machine
        self.history.append(machine)
        run = machine.labels.get("job-run", name)
        alive = sum(m.labels.get("job-run") == run for m in self.alive.values())
        self.most_alive[run] = max(self.most_alive[run], alive)

    def _advance(self, machine: Machine) -> bool:
        """Move a machine one state forward and return whether it still exists."""
        if machine.deleting is not None:
            machine.deleting -= 1
            if machine.deleting < 0:
                self.remove(machine)
                return False
            return True
        if machine.life:
            self._step(machine, machine.life.pop(0))
        if machine.state in UP and not machine.booted:
            machine.booted = True
            self.on_boot(machine)
        return machine.state != "gone"

    def _step(self, machine: Machine, step: str) -> None:
        if step.startswith("exit "):
            self.on_exit(machine, int(step[5:]))
        elif step == "gone":
            machine.state = "gone"
            self.remove(machine)
        else:
            machine.state, _, machine.problem = step.partition(": ")

    def remove(self, machine: Machine) -> None:
        """Remove a machine."""
        if self.alive.pop((machine.kind, machine.zone, machine.name), None):
            self.on_gone(machine)

    def _resource(self, machine: Machine) -> dict[str, Any]:
        url = f"{self._url()}/compute/v1/projects/p/zones/{machine.zone}"
        if machine.kind == "gce":
            return machine.order | {"status": machine.state, "zone": url, "id": "1"}
        where = f"projects/p/locations/{machine.zone}/queuedResources/{machine.name}"
        state: dict[str, Any] = {"state": machine.state}
        if machine.problem:
            state["failedData"] = {"error": {"code": 8, "message": machine.problem}}
        return machine.order | {"name": where, "state": state}

    def _all_instances(self) -> Reply:
        zones: dict[str, Any] = {}
        for machine in list(self.alive.values()):
            if machine.kind == "gce" and self._advance(machine):
                inside = zones.setdefault(f"zones/{machine.zone}", {"instances": []})
                inside["instances"].append(self._resource(machine))
        return json_reply({"items": zones})

    def _start_operation(self, kind: str, zone: str, what: str) -> dict[str, Any]:
        if kind == "queued":
            return {"name": f"projects/p/locations/{zone}/operations/{what}", "done": False}
        return self._operation(f"/compute/v1/projects/p/zones/{zone}/operations/{what}", what)

    def _failed_operation(self, zone: str, what: str) -> dict[str, Any]:
        """Return a Compute Engine operation that failed for lack of capacity."""
        operation = self._start_operation("gce", zone, what)
        problem = {
            "code": "ZONE_RESOURCE_POOL_EXHAUSTED",
            "message": f"The zone '{zone}' does not have enough resources available.",
        }
        operation["error"] = {"errors": [problem]}
        operation["httpErrorStatusCode"] = 503
        return operation

    def _operation(self, route: str, name: str) -> dict[str, Any]:
        """Return a finished Compute Engine operation."""
        route = route.removesuffix("/wait")
        zone = route.split("/zones/")[1].split("/")[0]
        zone_url = f"{self._url()}/compute/v1/projects/p/zones/{zone}"
        kind, _, target = name.partition("-")
        return {
            "kind": "compute#operation",
            "id": "1",
            "name": name,
            "status": "DONE",
            "operationType": kind,
            "zone": zone_url,
            "selfLink": f"{self._url()}{route}",
            "targetLink": f"{zone_url}/instances/{target}",
        }
