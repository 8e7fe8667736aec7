"""Run states as submit.sh writes them, and checks of the final state."""

import hashlib

from tests.services.cloud import BUCKET, Cloud


def machine_of(run: str) -> str:
    """Return the name of a run's machine."""
    return f"job-{run}-" + hashlib.sha256(f"gs://{BUCKET}/infra/{run}".encode()).hexdigest()[:8]


RUN = "r1"
NAME = machine_of(RUN)
SERVING_QUOTA = "TPUV5sPreemptibleLitepodServingPerProjectPerZoneForTPUAPI"

_STATE = {
    "active_since": "",
    "attempt": "1",
    "accelerator_type": "v5litepod-8",
    "boot_disk_gb": "200",
    "bad_nodes": "0",
    "container_flags": "--net=host",
    "expires": "0",
    "failures": "0",
    "image": "us-west4-docker.pkg.dev/test-project/job/job@sha256:" + "1" * 64,
    "internal_ips": "no",
    "image_family": "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e",
    "image_project": "ubuntu-os-accelerator-images",
    "lost": "0",
    "machine": "v5e-8",
    "machine_type": "ct5lp-hightpu-8t",
    "max_attempts": "10",
    "max_run_seconds": "14400",
    "network": "default",
    "no_quota": "",
    "not_before": "0",
    "ordered": "0",
    "output": f"gs://{BUCKET}/runs",
    "owner": "",
    "phase": "create",
    "provisioner": "queued",
    "quota": SERVING_QUOTA,
    "run": RUN,
    "run_uri": f"gs://{BUCKET}/runs/{RUN}",
    "runtime_version": "v2-alpha-tpuv5-lite",
    "secrets": "HF_TOKEN",
    "self_delete": "yes",
    "service_account": "job-runner@test-project.iam.gserviceaccount.com",
    "spec": f"gs://{BUCKET}/infra/{RUN}/spec.yaml",
    "spot": "yes",
    "stall_seconds": "1800",
    "started": "",
    "submission": "1",
    "subnetwork": "",
    "unclear": "0",
    "wait_seconds": "900",
    "was_active": "",
    "zone_index": "0",
    "zones": "us-west4-a us-central1-a",
}


def submitted(cloud: Cloud, run: str = RUN, **values: str) -> None:
    """Store the state of a submitted run that has no watcher."""
    state = {**_STATE, "run": run, **values}
    lines = "".join(f"{key}={state[key]}\n" for key in sorted(state))
    cloud.put(BUCKET, f"infra/{run}/state", lines.encode())


def state_of(cloud: Cloud, run: str = RUN) -> dict[str, str]:
    """Read the state of a run from the bucket."""
    text = cloud.objects[BUCKET, f"infra/{run}/state"].data.decode()
    return dict(line.split("=", 1) for line in text.splitlines())


def check_clean(cloud: Cloud, run: str = RUN) -> None:
    """Check that no machine is left and that the run never had two at once."""
    assert cloud.machines.alive == {}
    assert cloud.machines.most_alive[machine_of(run)] <= 1
    assert state_of(cloud, run)["phase"] == "ended"
