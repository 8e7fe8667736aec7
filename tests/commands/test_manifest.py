"""Manifests: valid, for the right nodes, and run to the end by a cluster's rules."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from job.commands.manifest import Cluster as Names
from job.commands.manifest import kubernetes_manifest
from job.errors import UsageError
from job.machine.accelerators import parse_machine
from job.spec.load import load_spec
from tests.commands.kubelet import Cluster, kill
from tests.services.bucket import Bucket

ANYWHERE = ("runtime.platform=any", "runtime.devices=null", "output=gs://runs/all")


def manifest(spec: str, machine: str, names: Names, *overrides: str, **options: Any) -> list[Any]:
    loaded = load_spec(spec, [*ANYWHERE, *overrides])
    text = kubernetes_manifest(loaded, parse_machine(machine), names, **options)
    return list(yaml.safe_load_all(text))


def holds(value: Any, part: Any) -> bool:
    """Tell whether a value has all that `part` has; defaults may be added."""
    if isinstance(part, dict):
        return all(key in value and holds(value[key], part[key]) for key in part)
    if isinstance(part, list):
        return len(value) == len(part) and all(map(holds, value, part))
    return bool(value == part)


def check(document: Any) -> None:
    """Check a document strictly: all fields are known, and have the right types."""
    if document["kind"] == "JobSet":
        known = JobsetV1alpha2JobSet.from_dict(json.loads(json.dumps(document)))
        assert known is not None
        assert holds(known.to_dict(), document)
        (replicated,) = document["spec"]["replicatedJobs"]
        job = {"metadata": {"name": "pods"}, "spec": replicated["template"]["spec"]}
        document = {"apiVersion": "batch/v1", "kind": "Job", **job}
    kubernetes_validate.validate(document, "1.37", strict=True)


TPU, GPU = "cloud.google.com/gke-tpu-", "cloud.google.com/gke-accelerator"


@pytest.mark.parametrize(
    ("machine", "pods", "chips", "selector"),
    [
        ("v5e-1", 1, {"google.com/tpu": 1}, ("tpu-v5-lite-podslice", "1x1")),
        ("v5e-8", 1, {"google.com/tpu": 8}, ("tpu-v5-lite-podslice", "2x4")),
        ("v5e-16", 4, {"google.com/tpu": 4}, ("tpu-v5-lite-podslice", "4x4")),
        ("v5p-8", 1, {"google.com/tpu": 4}, ("tpu-v5p-slice", "2x2x1")),
        ("v5p-16", 2, {"google.com/tpu": 4}, ("tpu-v5p-slice", "2x2x2")),
        ("v6e-8", 1, {"google.com/tpu": 8}, ("tpu-v6e-slice", "2x4")),
        ("v4-8", 1, {"google.com/tpu": 4}, ("tpu-v4-podslice", "2x2x1")),
        ("h100-8", 1, {"nvidia.com/gpu": 8}, ("nvidia-h100-80gb",)),
        ("h200-16", 2, {"nvidia.com/gpu": 8}, ("nvidia-h200-141gb",)),
        ("a100-1", 1, {"nvidia.com/gpu": 1}, ("nvidia-a100-80gb",)),
        ("cpu", 1, None, ()),
    ],
)
@pytest.mark.parametrize("queued", [False, True])
def test_each_machine_gets_its_nodes(
    machine: str, pods: int, chips: dict[str, int] | None, selector: tuple[str, ...], queued: bool
) -> None:
    names = Names("team", "tpu", "runner") if queued else Names()
    spec = "smoke" if machine == "cpu" else "chatdoctor-gemma3-1b"
    config, workload = manifest(spec, machine, names, spot=queued)
    for document in (config, workload):
        check(document)
    assert workload["kind"] == ("Job" if pods == 1 else "JobSet")
    assert workload["spec"].get("suspend", False) == queued
    labels = workload["metadata"]["labels"]
    assert labels.get("kueue.x-k8s.io/queue-name") == names.queue
    job = workload["spec"]
    if pods > 1:
        job = job["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"]) == (pods, pods)
    pod = job["template"]["spec"]
    assert pod.get("serviceAccountName") == names.service_account
    (container,) = pod["containers"]
    assert container["resources"].get("limits") == chips
    keys = (f"{TPU}accelerator", f"{TPU}topology") if len(selector) == 2 else (GPU,)
    expected = dict(zip(keys, selector, strict=False))
    expected |= {"cloud.google.com/gke-spot": "true"} if queued else {}
    assert pod.get("nodeSelector", {}) == expected
    assert config["data"]["spec.yaml"].startswith("name: ")


def test_the_spec_in_a_manifest_is_the_whole_spec(tmp_path: Path) -> None:
    config, workload = manifest("smoke", "cpu", Names(), "data.system='a: #b'")
    (tmp_path / "spec.yaml").write_text(config["data"]["spec.yaml"])
    again = load_spec(str(tmp_path / "spec.yaml")).spec
    assert again == load_spec("smoke", [*ANYWHERE, "data.system='a: #b'"]).spec
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["run", "/spec/spec.yaml", "--run-id", container["args"][-1]]


@pytest.mark.parametrize(
    ("spec", "machine", "names", "options", "message"),
    [
        ("chatdoctor-gemma3-1b", "cpu", Names(), {}, "cpu is a cpu, but runtime.platform is tpu"),
        ("chatdoctor-gemma3-1b", "v5e-4", Names(), {}, "has 4 devices, but runtime.devices is 8"),
        ("smoke", "cpu", Names(queue="My Queue"), {}, "--queue 'My Queue': write lower-case"),
        ("smoke", "cpu", Names("a\nb"), {}, "--namespace"),
        ("smoke", "cpu", Names(), {"image": "a: b"}, "--image 'a: b': write an image's name"),
        ("smoke", "cpu", Names(), {"run_id": "a/b"}, "--run-id 'a/b'"),
    ],
)
def test_what_cannot_run_is_refused(
    spec: str, machine: str, names: Names, options: dict[str, str], message: str
) -> None:
    loaded = load_spec(spec, ["output=gs://runs/all"])
    with pytest.raises(UsageError, match=message):
        kubernetes_manifest(loaded, parse_machine(machine), names, **options)  # type: ignore[arg-type]


def test_a_spec_with_local_files_is_refused() -> None:
    with pytest.raises(UsageError, match=r"output: './runs' is a local folder"):
        kubernetes_manifest(load_spec("smoke"), parse_machine("cpu"), Names())


def test_the_queue_of_infra_admits_its_machine() -> None:
    path = Path(__file__).parents[2] / "infra" / "queue.yaml"
    flavor, queue, local = yaml.safe_load_all(path.read_text())
    _, workload = manifest("chatdoctor-gemma3-1b", "v5e-8", Names(queue=local["metadata"]["name"]))
    pod = workload["spec"]["template"]["spec"]
    assert flavor["spec"]["nodeLabels"] == pod["nodeSelector"]
    (group,) = queue["spec"]["resourceGroups"]
    (container,) = pod["containers"]
    asked = {*container["resources"]["requests"], *container["resources"]["limits"]}
    assert asked == {*group["coveredResources"]}
    assert asked == {resource["name"] for resource in group["flavors"][0]["resources"]}
    assert group["flavors"][0]["name"] == flavor["metadata"]["name"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]


SHORT = (
    "train.epochs=2", "train.checkpoint_every=2", "evals.dialogue=null", "train.log_every=1",
    "evals.multiple_choice=[]", "evals.side_by_side.examples=0", "reference=null",
)  # fmt: skip


def results(bucket: Bucket) -> dict[str, Any]:
    (content,) = [o.data for (_, k), o in bucket.objects.items() if k.endswith("/results.json")]
    read: dict[str, Any] = json.loads(content)
    return read


def wait_for(cluster: Cluster, start: int, text: str) -> None:
    until = time.monotonic() + 300
    while text not in cluster.log(start):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["cpu", "h100-16"])
def test_pods_that_are_killed_in_training_are_replaced(
    machine: str, two_blocks: str, bucket: Bucket, tmp_path: Path
) -> None:
    """One pod, or two as two processes."""
    loaded = load_spec("smoke", [*ANYWHERE, *SHORT])
    text = kubernetes_manifest(loaded, parse_machine(machine), Names(), image="job@sha256:1")
    cluster = Cluster(text, tmp_path, {"HF_TOKEN": "hf_secret"})

    def interrupt(start: int, pods: list[subprocess.Popen[str]]) -> None:
        if start == 1:
            wait_for(cluster, 1, '"step": 4,')  # with a checkpoint at 2
            kill(pods[-1:])

    assert cluster.run(interrupt)
    assert cluster.starts == 2
    assert "resumed from a checkpoint" in cluster.log(2)
    assert results(bucket)["environment"]["image"] == "job@sha256:1"
    assert "hf_secret" not in text


@pytest.mark.slow
def test_a_wrong_spec_is_not_tried_again(bucket: Bucket, tmp_path: Path) -> None:
    loaded = load_spec("smoke", [*ANYWHERE, "data.prompt='{nothing}'"])
    text = kubernetes_manifest(loaded, parse_machine("cpu"), Names())
    cluster = Cluster(text, tmp_path, {})
    assert not cluster.run(lambda _start, _pods: None)
    assert cluster.starts == 1
    assert "no column 'nothing'" in cluster.log(1)
