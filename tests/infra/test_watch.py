"""The life of a run's machine: preemption, refusals, lost responses, the maximum run time."""

import pytest

from tests.infra.conftest import INFRA, Scripts
from tests.infra.runs import NAME, RUN, SERVING_QUOTA, check_clean, state_of, submitted
from tests.services.cloud import BUCKET, Cloud

UP = ("ACCEPTED", "ACTIVE")
DONE = (*UP, "exit 0")


def zones(cloud: Cloud) -> list[str]:
    """Return the zones of the granted machines, in order."""
    return [machine.zone for machine in cloud.machines.history]


@pytest.mark.slow
def test_submit_creates_watches_and_deletes_the_machine(cloud: Cloud, scripts: Scripts) -> None:
    cloud.machines.lives = [DONE]
    cloud.machines.delete_looks = 1
    done = scripts.run("submit", "smoke", "--run-id", RUN, "--set", "train.epochs=1", "--wait")
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
    assert state_of(cloud)["stall_seconds"] == "1801"
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
    submitted(cloud)
    cloud.machines.refusals = {"us-west4-a": ["capacity"], "us-central1-a": ["rate"]}
    cloud.machines.lives = [
        ("WAITING_FOR_RESOURCES", "FAILED: There is no more capacity in the zone"),
        DONE,
    ]
    done = scripts.run("supervise", RUN)
    assert done.code == 0, done.err
    check_clean(cloud)
    assert zones(cloud) == ["us-central1-a", "us-west4-a"]
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
def test_a_bad_node_is_replaced_twice_at_most(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud)
    cloud.machines.lives = [(*UP, "exit 3")] * 3
    done = scripts.run("supervise", RUN)
    assert done.code == 3
    assert "wrong environment on 3 machines" in done.err
    assert len(cloud.machines.history) == 3
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
