"""Many watchers, killed watchers, and machines without a watcher."""

import os
import signal
import time

import pytest

from tests.infra.conftest import Scripts
from tests.infra.runs import NAME, RUN, check_clean, machine_of, state_of, submitted
from tests.infra.test_watch import DONE, UP
from tests.services.cloud import BUCKET, Cloud

pytestmark = pytest.mark.slow


def wait_for_requests(cloud: Cloud, number: int) -> None:
    deadline = time.monotonic() + 120
    while len(cloud.requests) < number and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_new_watcher_resumes_after_a_kill_anywhere(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud)
    cloud.machines.lives = [(*UP, "SUSPENDED"), DONE, DONE]
    kills = 0
    while state_of(cloud)["phase"] != "ended":
        watcher = scripts.start("supervise", RUN, LEASE_SECONDS="2")
        # Taking over takes six requests. Each watcher gets a little further than the one before.
        wait_for_requests(cloud, len(cloud.requests) + 8 + kills)
        if watcher.poll() is None:
            os.killpg(watcher.pid, signal.SIGKILL)
        kills += 1
        assert kills < 20
    assert kills > 3
    assert 2 <= len(cloud.machines.history) <= 3
    check_clean(cloud)


def test_two_watchers_create_one_machine(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud)
    cloud.machines.lives = [DONE]
    both = [scripts.start("supervise", RUN, POLL_SECONDS="1") for _ in range(2)]
    errors = [watcher.communicate(timeout=300)[1] for watcher in both]
    assert [watcher.returncode for watcher in both] == [0, 0], errors
    assert sum("standing by" in text for text in errors) == 1
    assert len(cloud.machines.history) == 1
    check_clean(cloud)


def test_a_stopped_watcher_releases_its_lease(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud)
    watcher = scripts.start("supervise", RUN)
    wait_for_requests(cloud, 12)
    watcher.send_signal(signal.SIGTERM)
    assert watcher.wait(120) == 130
    assert int(state_of(cloud)["expires"]) <= time.time()


def test_a_watched_run_can_be_cancelled(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud)
    watcher = scripts.start("supervise", RUN, POLL_SECONDS="1")
    wait_for_requests(cloud, 12)
    cancelled = scripts.run("cancel", RUN)
    assert cancelled.code == 0, cancelled.err
    assert watcher.wait(300) == 75
    assert state_of(cloud)["outcome"] == "cancelled"
    check_clean(cloud)


def test_reap_deletes_leftover_machines_only(cloud: Cloud, scripts: Scripts) -> None:
    def machine(run: str, zone: str, bucket: str = BUCKET) -> None:
        labels = {"managed-by": "job-infra", "job-run": run}
        node = {"labels": labels, "metadata": {"job-control": f"gs://{bucket}/infra/{run}"}}
        order = {"tpu": {"nodeSpec": [{"node": node}]}}
        cloud.machines.order("queued", zone, machine_of(run), order)

    submitted(cloud, "done", phase="ended", outcome="done")
    submitted(cloud, "work", phase="run", expires=str(int(time.time()) + 600))
    submitted(cloud, "late", phase="run", started="1")
    machine("done", "us-west4-a")
    machine("work", "us-west4-a")
    machine("late", "us-west4-a")
    # Nobody saw these start.
    submitted(cloud, "lost", phase="run", ordered=str(int(time.time()) - 900 - 14400 - 60))
    submitted(cloud, "fresh", phase="run", ordered=str(int(time.time()) - 900))
    machine("lost", "us-west4-a")
    machine("fresh", "us-west4-a")
    machine("unknown", "us-central1-a")
    machine("of-others", "us-west4-a", "their-bucket")
    planned = scripts.run("reap", "--dry-run")
    assert planned.code == 0, planned.err
    assert planned.out.count("queued-resources delete") == 4
    assert len(cloud.machines.alive) == 7
    done = scripts.run("reap")
    assert done.code == 0, done.err
    for why in (
        "has ended (done)",
        "past the maximum run time",
        "is unknown",
        "is in use",
        "not deleted",
    ):
        assert why in done.err
    deleted = [str(request) for request in cloud.requested("DELETE /v2/")]
    assert len(deleted) == 4
    kept = ("job-work", "job-fresh", "of-others")
    assert not [line for line in deleted if any(name in line for name in kept)]


def test_compute_engine_machines_are_watched_too(cloud: Cloud, scripts: Scripts) -> None:
    cloud.machines.refusals = {"us-west4-a": ["capacity"]}
    cloud.machines.lives = [
        ("STAGING", "RUNNING", "gone"),
        ("STAGING", "RUNNING", "exit 0"),
    ]
    settings = {"PROVISIONER": "gce", "MACHINE": "v6e-8", "INTERNAL_IPS": "yes"}
    done = scripts.run("submit", "smoke", "--no-plan", "--run-id", RUN, "--wait", **settings)
    assert done.code == 0, done.err
    check_clean(cloud)
    assert [m.zone for m in cloud.machines.history] == ["us-central1-a", "us-west4-a"]
    machine = cloud.machines.history[0]
    assert machine.order["machineType"].endswith("/machineTypes/ct6e-standard-8t")
    [interface] = machine.order["networkInterfaces"]
    assert "accessConfigs" not in interface  # no external IP
    assert machine.order["scheduling"] == {
        "automaticRestart": False,
        "instanceTerminationAction": "DELETE",
        "maxRunDuration": {"seconds": "14400"},
        "onHostMaintenance": "TERMINATE",
        "preemptible": True,
        "provisioningModel": "SPOT",
    }
    [disk] = machine.order["disks"]
    source = disk["initializeParams"]["sourceImage"]
    assert "/projects/ubuntu-os-accelerator-images/" in source
    assert source.endswith("/ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e")
    assert machine.labels == {"managed-by": "job-infra", "job-run": NAME}
    assert machine.metadata["job-control"] == f"gs://{BUCKET}/infra/{RUN}"
