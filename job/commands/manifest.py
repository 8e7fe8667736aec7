"""`job manifest`: the Kubernetes objects that run a spec on GKE, for `kubectl apply -f -`."""

import re
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from job.errors import UsageError
from job.machine.accelerators import Machine
from job.pipeline.preflight import check_run_id
from job.spec.load import LoadedSpec, check_portable, spec_text
from job.spec.schema import Spec

_RETRIES = 10
"""Starts after failures that may pass; each resumes the run."""

_CHIPS = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu", "cpu": ""}
_IMAGES = {"tpu": "job:tpu", "gpu": "job:cuda", "cpu": "job:cpu"}
_REQUESTS = {"tpu": (8, "32Gi"), "gpu": (8, "32Gi"), "cpu": (2, "6Gi")}
"""CPUs and memory of a pod; one with chips has its host to itself."""

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"


@dataclass(frozen=True)
class Cluster:
    """Names in the cluster."""

    namespace: str = "default"
    queue: str | None = None
    """A LocalQueue of Kueue; None: the job starts at once."""
    service_account: str | None = None


def kubernetes_manifest(
    loaded: LoadedSpec,
    machine: Machine,
    cluster: Cluster,
    *,
    image: str | None = None,
    run_id: str | None = None,
    spot: bool = False,
    max_seconds: int = 14_400,
) -> str:
    """Return a ConfigMap with the spec, and a Job for one host or a JobSet for a slice.

    Raises:
        SpecError, UsageError: the spec names local files, is for another machine, or a name is
            not one of Kubernetes.
    """
    check_portable(loaded)
    _check_machine(loaded.spec, machine)
    for option, name in (
        ("--namespace", cluster.namespace),
        ("--queue", cluster.queue),
        ("--service-account", cluster.service_account),
    ):
        if name is not None and not re.fullmatch(_LABEL, name):
            raise UsageError(f"{option} {name!r}: write lower-case letters, digits and '-'")
    platform = machine.accelerator.platform
    image = image or _IMAGES[platform]
    if not re.fullmatch(r"[\w./:@-]+", image):
        raise UsageError(f"--image {image!r}: write an image's name, with its digest")
    run = check_run_id(run_id, loaded.spec)
    cpus, memory = _REQUESTS[platform]
    environment = Environment(
        loader=PackageLoader("job", "commands"),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("kubernetes.yaml.j2").render(
        run=run,
        name=re.sub("[^a-z0-9]+", "-", run.lower())[-40:].strip("-"),
        spec=spec_text(loaded.spec).rstrip(),
        machine=machine,
        image=image,
        selector=_node_selector(machine, spot=spot),
        chips=_CHIPS[platform],
        cpus=cpus,
        memory=memory,
        spot=spot,
        max_seconds=max_seconds,
        retries=_RETRIES,
        **vars(cluster),
    )


def _check_machine(spec: Spec, machine: Machine) -> None:
    runtime, platform = spec.runtime, machine.accelerator.platform
    if runtime.platform not in ("any", platform):
        raise UsageError(
            f"--on {machine.name} is a {platform}, but runtime.platform is {runtime.platform}; "
            "add --set runtime.platform=any"
        )
    if platform != "cpu" and runtime.devices not in (None, machine.chips):
        raise UsageError(
            f"--on {machine.name} has {machine.chips} devices, but runtime.devices is "
            f"{runtime.devices}; add --set runtime.devices=null"
        )


def _node_selector(machine: Machine, *, spot: bool) -> dict[str, str]:
    kind, selector = machine.accelerator, {}
    if kind.platform == "tpu":
        selector["cloud.google.com/gke-tpu-accelerator"] = kind.gke
        selector["cloud.google.com/gke-tpu-topology"] = machine.topology or ""
    elif kind.platform == "gpu":
        selector["cloud.google.com/gke-accelerator"] = kind.gke
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
    return selector
