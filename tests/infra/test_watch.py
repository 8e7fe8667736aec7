"""The life of a run's machine: preemption, refusals, lost responses, the maximum run time."""

import subprocess
import time

import pytest

from tests.infra.conftest import INFRA, Scripts
from tests.infra.runs import (
    NAME,
    RUN,
    SERVING_QUOTA,
    check_clean,
    machine_of,
    state_of,
    submitted,
)
from tests.services.cloud import BUCKET, Cloud

UP = ("ACCEPTED", "ACTIVE")
DONE = (*UP, "exit 0")


def zones(cloud: Cloud) -> list[str]:
    """Return the zones of the granted machines, in order."""
    return [machine.zone for machine in cloud.machines.history]


def order_machine(cloud: Cloud, run: str, *life: str) -> None:
    """Create the machine of a run in the first zone, before any watcher."""
    labels = {"managed-by": "job-infra", "job-run": machine_of(run)}
    metadata = {"job-control": f"gs://{BUCKET}/infra/{run}", "job-attempt": "1"}
    node = {"labels": labels, "metadata": metadata}
    cloud.machines.lives = [life]
    order = {"tpu": {"nodeSpec": [{"node": node}]}}
    cloud.machines.order("queued", "us-west4-a", machine_of(run), order)


@pytest.mark.slow
def test_submit_creates_watches_and_deletes_the_machine(cloud: Cloud, scripts: Scripts) -> None:
    cloud.machines.lives = [DONE]
    cloud.machines.delete_looks = 1
    settings = ("--set", "train.epochs=1", "--set", "runtime.stall_minutes=2")
    done = scripts.run("submit", "smoke", "--run-id", RUN, *settings, "--wait")
    assert done.code == 0, done.err
    check_clean(cloud)
    [machine] = cloud.machines.history
    order, node = machine.order, machine.node
    assert (machine.zone, machine.name, machine.spot) == ("us-west4-a", NAME, True)
    assert order["queueingPolicy"] == {"validUntilDuration": "900s"}
    assert node["acceleratorType"] == "v5litepod-8"
    assert node["runtimeVersion"] == "v2-alpha-tpuv5-lite"
    assert node["serviceAccount"]["email"] == "job-runner@test-project.iam.gserviceaccount.com"
    assert machine.labels == {"managed-by": "job-infra", "job-run": NAME}
    assert machine.metadata["job-project"] == "test-project"
    assert machine.metadata["startup-script"] == (INFRA / "startup.sh").read_text()
    assert machine.metadata["job-image"].endswith("/job/job@sha256:" + "1" * 64)
    assert machine.metadata["job-secrets"].split() == [
        "HF_TOKEN=projects/test-project/secrets/job-hf-token",
        "OPENROUTER_API_KEY=projects/test-project/secrets/job-openrouter-api-key",
    ]
    bucket, _, name = machine.metadata["job-spec"].removeprefix("gs://").partition("/")
    assert name.startswith(f"infra/{RUN}/spec-")
    spec = cloud.objects[bucket, name].data.decode()
    assert "epochs: 1\n" in spec
    assert f"output: gs://{BUCKET}/runs\n" in spec
    assert "4.624 USD per hour spot in us-west4 (list price of 2026-08)" in done.err
    assert state_of(cloud)["stall_seconds"] == "1801"  # at least the time of a silent pull
    assert f"gs://{BUCKET}/runs/{RUN}" in done.err
    assert state_of(cloud)["outcome"] == "done"


@pytest.mark.slow
def test_a_lost_machine_is_replaced_in_the_next_zone(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud)
    cloud.machines.lives = [
        ("PROVISIONING", "SUSPENDED"),
        (*UP, "SUSPENDING", "SUSPENDED"),
        (*UP, "gone"),
        DONE,
    ]
    done = scripts.run("supervise", RUN)
    assert done.code == 0, done.err
    check_clean(cloud)
    assert zones(cloud) == ["us-west4-a", "us-central1-a"] * 2
    attempts = [machine.metadata["job-attempt"] for machine in cloud.machines.history]
    assert attempts == ["1", "2", "3", "4"]


@pytest.mark.slow
def test_no_capacity_moves_to_the_next_zone(cloud: Cloud, scripts: Scripts) -> None:
    # An answer about capacity is clear, and shows that there is quota.
    submitted(cloud, unclear="4", no_quota="us-west4-a")
    cloud.machines.refusals = {
        "us-west4-a": ["capacity"],
        "us-central1-a": ["rate", "unknown", "quota"],
    }
    cloud.machines.lives = [
        ("WAITING_FOR_RESOURCES", "FAILED: There is no more capacity in the zone"),
        DONE,
    ]
    done = scripts.run("supervise", RUN)
    assert done.code == 0, done.err
    check_clean(cloud)
    assert zones(cloud) == ["us-west4-a", "us-central1-a"]
    assert "no capacity in us-west4-a" in done.err
    assert "per minute" in done.err


@pytest.mark.slow
def test_a_zone_without_quota_is_skipped(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud)
    cloud.machines.refusals = {"us-west4-a": ["quota"]}
    cloud.machines.lives = [DONE]
    done = scripts.run("supervise", RUN)
    assert done.code == 0, done.err
    assert zones(cloud) == ["us-central1-a"]
    check_clean(cloud)


@pytest.mark.slow
def test_zones_without_capacity_cost_no_attempt(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud, max_attempts="1")
    cloud.machines.refusals = {zone: ["capacity"] * 2 for zone in ("us-west4-a", "us-central1-a")}
    cloud.machines.lives = [("ACCEPTED", "FAILED: There is no more capacity in the zone"), DONE]
    done = scripts.run("supervise", RUN)
    assert done.code == 0, done.err
    assert len(cloud.requested("POST /v2/")) == 6
    check_clean(cloud)


@pytest.mark.slow
def test_an_order_that_was_not_granted_in_time_refuses_nothing(
    cloud: Cloud, scripts: Scripts
) -> None:
    # Two more unclear responses would end the run, and so would one order that cannot work.
    submitted(cloud, wait_seconds="1", unclear="3")
    cloud.machines.lives = [
        ("ACCEPTED", "FAILED: The request expired before the resources were available"),
        ("ACCEPTED", "FAILED: 'valid until' start timing constraint expired"),
        DONE,
    ]
    cloud.machines.refusals = {"us-central1-a": ["unknown"]}
    done = scripts.run("supervise", RUN)
    assert done.code == 0, done.err
    assert "no capacity in us-west4-a (The request expired" in done.err
    assert len(cloud.machines.history) == 3
    check_clean(cloud)


@pytest.mark.slow
def test_an_order_that_failed_for_its_rate_is_replaced(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud)
    cloud.machines.lives = [("ACCEPTED", "FAILED: Quota exceeded for 'Mutate per minute'"), DONE]
    done = scripts.run("supervise", RUN)
    assert done.code == 0, done.err
    assert "the machine in us-west4-a was not granted: Quota exceeded" in done.err
    check_clean(cloud)


@pytest.mark.slow
def test_a_machine_that_nobody_saw_counts_from_its_order(cloud: Cloud, scripts: Scripts) -> None:
    ordered = str(int(time.time()) - 20000)  # longer ago than the maximum run time
    submitted(cloud, "r2", phase="run", ordered=ordered)
    cloud.put(BUCKET, "infra/r2/marks/exit-1-0-75", b"")
    cloud.machines.lives = [DONE]  # never ordered
    done = scripts.run("supervise", "r2")
    assert done.code == 75, done.err
    assert state_of(cloud, "r2")["started"] == ordered
    order_machine(cloud, "r3", "SUSPENDED")
    cloud.machines.lives = [DONE]
    submitted(cloud, "r3", phase="run", ordered=ordered)
    done = scripts.run("supervise", "r3")
    assert done.code == 75, done.err
    assert state_of(cloud, "r3")["started"] == ordered


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "end", "reason"),
    [(3, 3, "the job found a wrong environment"), (137, 4, "perhaps out of memory")],
)
def test_a_bad_node_is_replaced_twice_at_most(
    cloud: Cloud, scripts: Scripts, code: int, end: int, reason: str
) -> None:
    submitted(cloud)
    cloud.machines.lives = [(*UP, f"exit {code}")] * 3 + [DONE]
    done = scripts.run("supervise", RUN)
    assert done.code == end
    assert reason in done.err
    assert f"exit code {code}: the last of 3 such machines" in done.err
    assert len(cloud.machines.history) == 3
    check_clean(cloud)


@pytest.mark.parametrize(
    ("marks", "code"),
    [
        ("1-125", "125"),
        ("1-137", "137"),
        ("1-124", ""),
        ("1-3", ""),
        ("0-3 1-137", "3"),
        ("1-137 0-0", "0"),
        ("10-134 0-75 9-127", "75"),
    ],
)
def test_a_crash_of_any_host_counts_and_the_first_host_decides(marks: str, code: str) -> None:
    code_of = f"""
      source {INFRA}/lib.sh; source {INFRA}/state.sh; source {INFRA}/watch.sh
      CONTROL=gs://b/infra RUN=r STATE=([submission]=1 [attempt]=1)
      gcloud_read() {{ RESULT=$(printf 'gs://b/infra/r/marks/exit-1-%s\n' $marks); }}
      marks=$1
      read_marks
      echo "$CODE" """
    done = subprocess.run(
        ["bash", "-c", code_of, "bash", marks], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == code


@pytest.mark.slow
@pytest.mark.parametrize("response", ["a time", "no time"])
def test_a_machine_whose_log_may_have_grown_is_kept(
    cloud: Cloud, scripts: Scripts, response: str
) -> None:
    if response == "no time":
        body = b'{"bucket": "b", "name": "n", "generation": "1", "size": "1"}'
        cloud.faults.add(f"GET /storage/v1/b/{BUCKET}/o/infra%2F{RUN}%2Flogs", 200, 9, body=body)
    cloud.put(BUCKET, f"infra/{RUN}/logs/1-0.log", b"working\n")
    order_machine(cloud, RUN, "ACTIVE", "ACTIVE", "exit 0")
    cloud.machines.lives = [DONE]  # never ordered
    submitted(cloud, phase="run", was_active="yes", active_since="1", stall_seconds="900")
    done = scripts.run("supervise", RUN)
    assert done.code == 0, done.err
    assert len(cloud.requested("logs%2F1-0.log")) >= 1
    assert len(cloud.machines.history) == 1
    check_clean(cloud)


@pytest.mark.slow
def test_a_machine_with_a_silent_log_is_replaced(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud, stall_seconds="1")
    cloud.machines.lives = [UP, ("ACCEPTED", "exit 0")]  # the second is never seen as silent
    done = scripts.run("supervise", RUN)
    assert done.code == 0, done.err
    assert "is up, but its log has not grown for 1 s" in done.err
    assert len(cloud.machines.history) == 2
    check_clean(cloud)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refusal", "settings", "orders", "reason"),
    [
        ("policy", {}, 1, "Constraint constraints/compute.vmExternalIpAccess violated"),
        ("unknown", {}, 5, "no clear response to 5 requests; the last in us-west4-a: "),
        (
            "",
            {"provisioner": "gce", "machine_type": "ct5lp-hightpu-8t"},
            1,
            "not allowed to use the machine type ct5lp-hightpu-8t",
        ),
    ],
    ids=["policy", "unknown", "v5e of Compute Engine"],
)
def test_a_refusal_that_lasts_ends_the_run(
    cloud: Cloud,
    scripts: Scripts,
    refusal: str,
    settings: dict[str, str],
    orders: int,
    reason: str,
) -> None:
    submitted(cloud, **settings)
    if refusal:
        cloud.machines.refusals = {"us-west4-a": [refusal] * 20}
    done = scripts.run("supervise", RUN)
    assert done.code == 3, done.err
    assert reason in done.err
    requests = cloud.requested("POST /v2/") + cloud.requested("/instances")
    assert len([one for one in requests if one.method == "POST"]) == orders
    check_clean(cloud)


@pytest.mark.slow
def test_zones_that_all_lack_quota_end_the_run(cloud: Cloud, scripts: Scripts) -> None:
    cloud.machines.refusals = {zone: ["quota"] for zone in ("us-west4-a", "us-central1-a")}
    done = scripts.run("submit", "smoke", "--no-plan", "--run-id", RUN)
    assert done.code == 3
    [error] = [line for line in done.err.splitlines() if line.startswith("error: ")]
    for words in (
        "no quota in us-central1-a",
        "Limit: 0",
        f"request more of {SERVING_QUOTA}",
        "v5e-4",
    ):
        assert words in error
    assert len(cloud.requested("POST /v2/")) == 2
    check_clean(cloud)


@pytest.mark.slow
def test_lost_responses_and_failed_deletions_are_retried(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud)
    cloud.machines.lives = [DONE]
    cloud.faults.add("POST /v2/projects", spoil="stall")  # it took effect, but no response comes
    cloud.faults.add("POST /upload/storage", cut_after=0, skip=1)
    body = b'{"error": {"code": 400, "status": "FAILED_PRECONDITION", "message": "not now"}}'
    cloud.faults.add("DELETE /v2/", status=400, times=2, body=body)
    done = scripts.run("supervise", RUN, GCLOUD_TIMEOUT="15")
    assert done.code == 0, done.err
    assert "did not respond within 15 s" in done.err
    assert cloud.faults.pending == []
    assert len(cloud.machines.history) == 1
    assert done.err.count("cannot delete the machine in us-west4-a yet") == 2
    assert len(cloud.requested("DELETE /v2/")) == 3
    check_clean(cloud)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lives", "settings", "code", "reason"),
    [
        (
            [("ACCEPTED", "FAILED: Quota limit 'TPUS' has been exceeded")] * 2, {},
            3, "Quota limit 'TPUS'",
        ),
        (
            [("ACCEPTED", "FAILED: The user does not have access to service account 'a@b'")], {},
            3, "does not have access to service account",
        ),
        ([(*UP, "exit 4")], {}, 4, "the job failed with exit code 4"),
        ([UP], {"max_run_seconds": "1"}, 75, "reached the maximum run time of 1 s"),
        ([(*UP, "exit 125")] * 2, {"max_attempts": "2"}, 4, "gave up after 2 machines"),
    ],
    ids=["late quota", "late account", "failed job", "maximum time", "maximum attempts"],
)  # fmt: skip
def test_a_run_that_cannot_go_on_ends_with_its_reason(
    cloud: Cloud, scripts: Scripts, lives: list[tuple[str, ...]], settings: dict[str, str],
    code: int, reason: str,
) -> None:  # fmt: skip
    submitted(cloud, **settings)
    cloud.machines.lives = [*lives, DONE]
    done = scripts.run("supervise", RUN)
    assert done.code == code
    assert reason in done.err
    assert len(cloud.machines.history) == len(lives)
    check_clean(cloud)
