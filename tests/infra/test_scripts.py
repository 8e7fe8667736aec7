"""The scripts' errors, output and secrets; setup, doctor, push_image, status and logs."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.infra.conftest import DIGEST, INFRA, Scripts
from tests.infra.runs import NAME, RUN, SERVING_QUOTA, submitted
from tests.services.cloud import BUCKET, TOKEN, Cloud

SECRET = "hf_very_secret_value_for_this_test"
MEMBER = "serviceAccount:job-runner@test-project.iam.gserviceaccount.com"
ALL = sorted(path.stem for path in INFRA.glob("*.sh") if path.read_text().count("\n# Usage:"))


def error(text: str) -> str:
    """Return the only error line."""
    [line] = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("script", ALL)
def test_every_script_prints_help(scripts: Scripts, script: str) -> None:
    done = scripts.run(script, "--help", PROJECT="")
    assert done.code == 0
    assert f"Usage: {'' if script == 'startup' else 'infra/'}{script}.sh" in done.out
    assert "--dry-run" in done.out


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "parts"),
    [
        (["submit", "smoke"], {"PROJECT": ""}, 3, ["no project", "config.env.example"]),
        (["submit", "smoke"], {"ZONES": "mars-1"}, 2, ["'mars-1'", "like us-west4-a"]),
        (["submit", "smoke"], {"MACHINE": "v5e-7"}, 2, ["'v5e-7'", "v5e-8"]),
        (["submit", "smoke"], {"MACHINE": "h100-1"}, 2, ["'h100-1' is not a TPU"]),
        (["submit", "smoke"], {"PROVISIONER": "aws"}, 2, ["'aws'", "queued", "gce"]),
        (["submit", "smoke"], {"PROVISIONER": "gce"}, 2, ["one host of v5p or v6e", "queued"]),
        (["submit", "smoke"], {"PROVISIONER": "gce", "MACHINE": "v6e-16"}, 2, ["one host"]),
        (["submit", "smoke"], {"PROJECT": "My Project"}, 2, ["PROJECT='My Project'", "ID"]),
        (["submit", "smoke"], {"PROJECT": "123456789"}, 2, ["not its name or number"]),
        (["submit", "smoke"], {"BUCKET": "gs://jobs"}, 2, ["BUCKET='gs://jobs'", "without gs://"]),
        (["submit", "smoke"], {"SERVICE_ACCOUNT": "me"}, 2, ["SERVICE_ACCOUNT='me'", "like job-"]),
        (["submit", "smoke"], {"IMAGE": "Job Image"}, 2, ["IMAGE='Job Image'"]),
        (["submit", "smoke"], {"INTERNAL_IPS": "1"}, 2, ["INTERNAL_IPS='1'", "yes or no"]),
        (["submit", "smoke"], {"MAX_RUN_SECONDS": "1h"}, 2, ["MAX_RUN_SECONDS='1h'"]),
        (["submit", "smoke"], {"INFRA_CONFIG": "/none"}, 2, ["INFRA_CONFIG=/none"]),
        (["submit", "smokes"], {}, 2, ["no spec 'smokes'", "did you mean 'smoke'"]),
        (["submit", "smoke", "--set", "train.epoch=1"], {}, 2, ["did you mean 'epochs'"]),
        (["submit", "smoke", "--set", "data.dataset=rows.jsonl"], {}, 2, ["is a local file"]),
        (["submit", "smoke", "--run-id", "a b"], {}, 2, ["--run-id 'a b'"]),
        (["submit"], {}, 2, ["expected a spec"]),
        (["submit", "smoke", "--fast"], {}, 2, ["unknown argument '--fast'"]),
        (["supervise"], {}, 2, ["expected one run"]),
        (["cancel", "../x/"], {}, 2, ["is not a run id"]),
        (["setup", "--secret", "hf_token"], {}, 2, ["a name like HF_TOKEN"]),
    ],
)
def test_a_mistake_gives_one_error_and_no_request(
    cloud: Cloud,
    scripts: Scripts,
    arguments: list[str],
    settings: dict[str, str],
    code: int,
    parts: list[str],
) -> None:
    done = scripts.run(*arguments, **settings)
    assert done.code == code, done.err
    for part in parts:
        assert part in done.err
    assert done.err.count("error: ") == 1
    assert cloud.requests == []


def test_an_unknown_setting_is_reported_with_its_line(cloud: Cloud, scripts: Scripts) -> None:
    (scripts.folder / "config.env").write_text('# mine\nZONES="us-west4-a"\nZONE=us-west4-a\n')
    done = scripts.run("status")
    assert done.code == 2
    assert "config.env:3: 'ZONE=us-west4-a' is not a setting" in error(done.err)


def test_scripts_fail_without_gcloud(scripts: Scripts, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for tool in Path(folder).iterdir():
            if tool.name not in ("gcloud", "gsutil") and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    for script in ("submit", "doctor", "setup", "status"):
        arguments = ("smoke",) if script in ("submit", "doctor") else ()
        done = scripts.run(script, *arguments, PATH=str(tools))
        assert done.code == 3
        assert "gcloud is not installed" in error(done.err)


def test_submit_dry_run_prints_commands_only(cloud: Cloud, scripts: Scripts) -> None:
    done = scripts.run("submit", "smoke", "--no-plan", "--run-id", RUN, "--dry-run")
    assert done.code == 0, done.err
    commands = [line for line in done.out.splitlines() if line.startswith("+ gcloud ")]
    assert [line.split()[2] for line in commands] == ["storage", "storage", "compute"]
    assert f"queued-resources create {NAME} " in commands[-1]
    assert "--accelerator-type=v5litepod-8" in commands[-1]
    assert "--spot" in commands[-1]
    assert cloud.requests == []


def test_defaults_suit_a_project_with_a_domain(cloud: Cloud, scripts: Scripts) -> None:
    settings = {"PROJECT": "example.com:lab", "BUCKET": "", "ZONES": "", "INTERNAL_IPS": "yes"}
    done = scripts.run("submit", "smoke", "--no-plan", "--dry-run", **settings)
    assert done.code == 0, done.err
    command = done.out.splitlines()[-1]
    for words in (
        "--zone=us-central1-a",
        "gs://example-com-lab-jobs/infra/",
        "us-central1-docker.pkg.dev/example.com/lab/job/job@sha256",
        "--service-account=job-runner@lab.example.com.iam.gserviceaccount.com",
        "projects/example.com:lab/secrets/",
        "--internal-ips",
    ):
        assert words in command
    assert "USD per hour spot in us-central1 (list price of 2026-08)" in done.err
    assert cloud.requests == []


def test_an_old_bash_is_told_what_is_needed(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("BASH_VERSION='3.2.57(1)-release'\n")
    for script in ALL:
        if script != "startup":  # it runs on the machine
            done = scripts.run(script, "--help", BASH_ENV=str(tmp_path / "old"))
            assert done.code == 3
            assert "brew install bash" in error(done.err)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ('There is no more capacity in the zone "us-west4-a"', "capacity"),
        ("The zone 'projects/p/zones/z' does not have enough resources available", "capacity"),
        ("Insufficient reserved capacity for the request", "capacity"),
        ("A ct6e VM instance is currently unavailable in the us-east5-b zone.", "capacity"),
        ("The service is currently unavailable.", "unclear"),
        ("'valid until' start timing constraint expired", "unclear"),
        ("Quota 'TPUS_PER_TPU_FAMILY' exceeded.  Limit: 0.0 in region us-east5.", "quota"),
        ("Quota exceeded for quota metric 'Mutate' and limit 'Mutate per minute'", "busy"),
        ("Constraint constraints/compute.vmExternalIpAccess violated for project 1", "invalid"),
        ('Operation denied by org policy: ["constraints/gcp.resourceLocations"]', "invalid"),
        ("The resource 'projects/p/global/networks/default' was not found", "missing"),
        ("The user does not have access to service account 'a@b'.  User: 'c'", "invalid"),
        ("The resource 'projects/i/global/images/family/ubuntu' was not found", "missing"),
        ("Runtime version v2-alpha is unknown", "invalid"),
        ("This user agent is not allowed to use the machine type ct5lp-hightpu-8t.", "invalid"),
        ("Permission 'tpu.nodes.create' denied on 'projects/p/locations/z'", "denied"),
        ("Internal error. Please try again", "unclear"),
    ],
)
def test_messages_of_google_cloud_are_classified(message: str, kind: str) -> None:
    code = f'source {INFRA}/lib.sh; classify "$1"; echo "$ERROR_KIND"'
    done = subprocess.run(
        ["bash", "-c", code, "bash", message], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == kind


@pytest.mark.parametrize("script", ["infra/test.sh", "docker/test.sh"])
def test_a_missing_docker_daemon_fails_only_in_ci(script: str, tmp_path: Path) -> None:
    for tool in ("docker", "dockerd"):
        (tmp_path / tool).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / tool).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    codes = [
        subprocess.run(
            ["bash", str(INFRA.parent / script)],
            env={**os.environ, "PATH": path, "CI": ci},
            capture_output=True,
            check=False,
        ).returncode
        for ci in ("", "true")
    ]
    assert codes == [77, 1]


@pytest.mark.slow
def test_a_missing_image_and_a_missing_run_are_errors(cloud: Cloud, scripts: Scripts) -> None:
    cloud.admin.tags.clear()
    done = scripts.run("submit", "smoke", "--no-plan")
    assert done.code == 3
    assert "infra/push_image.sh" in error(done.err)
    assert cloud.machines.history == []
    assert not [line for line, _ in cloud.bodies if line.startswith("POST")]
    done = scripts.run("supervise", "nobody")
    assert done.code == 2
    assert "there is no run 'nobody'" in error(done.err)


@pytest.mark.slow
def test_setup_is_idempotent_and_hides_secrets(cloud: Cloud, scripts: Scripts) -> None:
    bucket = "new-bucket"
    cloud.admin.repositories.clear()
    cloud.admin.unknown_members = 2
    for _ in range(2):
        done = scripts.run("setup", BUCKET=bucket)
        assert done.code == 0, done.err
    assert done.err.count("already exists") == 8
    assert "cloudbuild.googleapis.com" in cloud.admin.services
    created = cloud.created_buckets[bucket]
    assert created["iamConfiguration"] == {
        "publicAccessPrevention": "enforced",
        "uniformBucketLevelAccess": {"enabled": True},
    }
    assert len(created["lifecycle"]["rule"]) == 3
    assert cloud.admin.grants(MEMBER) == {
        (bucket, "roles/storage.objectUser"),
        ("job", "roles/artifactregistry.reader"),
        ("test-project", "roles/logging.logWriter"),
        ("test-project", "projects/test-project/roles/jobDeleteTpu"),
        ("test-project", "projects/test-project/roles/jobDeleteInstance"),
        ("job-hf-token", "roles/secretmanager.secretAccessor"),
        ("job-openrouter-api-key", "roles/secretmanager.secretAccessor"),
    }
    permissions = cloud.admin.roles["jobDeleteTpu"]["includedPermissions"]
    assert permissions == ["tpu.nodes.delete", "tpu.nodes.get"]
    permissions = cloud.admin.roles["jobDeleteInstance"]["includedPermissions"]
    assert permissions == ["compute.instances.delete"]
    assert cloud.admin.grants(MEMBER.replace("job-runner", "job-builder")) == {
        (bucket, "roles/storage.objectViewer"),
        ("job", "roles/artifactregistry.writer"),
        ("test-project", "roles/logging.logWriter"),
    }

    done = scripts.run("setup", "--secret", "HF_TOKEN", stdin=SECRET, BUCKET=bucket)
    assert done.code == 0, done.err
    assert cloud.admin.secrets["job-hf-token"] == [SECRET]
    assert SECRET not in done.out + done.err
    assert not [line for line, _ in cloud.bodies if SECRET in line or TOKEN in line]
    assert not [line for line, body in cloud.bodies if SECRET.encode() in body]
    files = [path for path in scripts.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]

    cloud.admin.quotas[SERVING_QUOTA] = {"": 8}
    done = scripts.run("doctor", "smoke", BUCKET=bucket)
    assert done.code == 0, done.out + done.err
    assert "FAIL" not in done.out


@pytest.mark.slow
def test_push_image_builds_pushes_and_prints_the_digest(
    cloud: Cloud, scripts: Scripts, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").symlink_to(Path(__file__).with_name("stand-in-docker.sh"))
    path = f"{tmp_path / 'bin'}:{scripts.environment['PATH']}"
    done = scripts.run("push_image", PATH=path, DOCKER_FOLDER=str(tmp_path))
    assert done.code == 0, done.err
    image = "us-west4-docker.pkg.dev/test-project/job/job"
    assert done.out == f"{image}@{DIGEST}\n"
    calls = (tmp_path / "calls").read_text()
    assert "EXTRA=tpu" in calls
    assert "--platform linux/amd64" in calls
    planned = scripts.run("push_image", "--cloud-build", "--dry-run")
    assert f"--gcs-source-staging-dir=gs://{BUCKET}/source" in planned.out
    assert f"--tag {image}:tpu" in calls
    assert f"push -q {image}:tpu\n" in calls
    # The token goes through standard input, and no Docker file has it.
    assert (tmp_path / "login").read_text().strip() == TOKEN
    assert TOKEN not in calls + done.out + done.err


@pytest.mark.slow
def test_doctor_reports_each_problem_and_its_fix(cloud: Cloud, scripts: Scripts) -> None:
    cloud.admin.quotas[SERVING_QUOTA] = {"us-west4-a": 8, "": 0}
    cloud.machines.offered = {"us-central1-a": set()}
    cloud.admin.tags.clear()
    cloud.machines.networks.clear()
    policy = {"listPolicy": {"allValues": "DENY"}}
    cloud.admin.org_policies["constraints/compute.vmExternalIpAccess"] = policy
    cloud.created_buckets[BUCKET] = {
        "retentionPolicy": {"retentionPeriod": "86400"},
        "defaultEventBasedHold": True,
        "billing": {"requesterPays": True},
        "location": "US-WEST4",
    }
    done = scripts.run("doctor", "smoke")
    assert done.code == 3
    for words in (
        "ok    quota in us-west4-a: 8 chips",
        "FAIL  quota in us-central1-a is 0 chips, and v5e-8 needs 8",
        "FAIL  us-central1-a has no v5e-8; remove it from ZONES",
        "a new project has 4 chips of v5e (v5e-4)",
        "FAIL  there is no network default; set NETWORK",
        "vmExternalIpAccess forbids external IPs; set INTERNAL_IPS=yes",
        f"gs://{BUCKET} has a retention policy of 86400 s; remove it",
        f"gs://{BUCKET} holds every new object; turn its default event-based hold off",
        f"gs://{BUCKET} makes the requester pay; turn that off",
        f"gs://{BUCKET} is in us-west4: Google bills what machines in other regions (us-central1)",
        "is not enabled; run infra/setup.sh",
        "there is no image",
        "there is no service account",
        f"cannot write to gs://{BUCKET}; run infra/setup.sh",
        "roles/jobDeleteTpu, so a machine cannot delete itself; run infra/setup.sh",
        "note  secret HF_TOKEN is not stored",
    ):
        assert words in done.out
    assert not [line for line, _ in cloud.bodies if line.split()[0] not in ("GET", "POST")]


@pytest.mark.slow
def test_an_active_run_is_shown_and_not_submitted_twice(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud, phase="run", started="1", reason="preempted")
    submitted(cloud, "r2", phase="ended", outcome="done", reason="done")
    log = b'{"message": "first"}\n{"message": "second"}\n'
    cloud.put(BUCKET, f"infra/{RUN}/logs/1-0.log", log)
    listed = scripts.run("status")
    assert listed.code == 0, listed.err
    assert [line.split()[:4] for line in listed.out.splitlines()] == [
        ["r1", "run", "attempt", "1"],
        ["r2", "done", "attempt", "1"],
    ]
    shown = scripts.run("status", RUN)
    assert shown.code == 0, shown.err
    for words in (
        "us-west4-a: none",
        "none; to start one",
        '"second"',
        f"gs://{BUCKET}/runs/{RUN}",
    ):
        assert words in shown.out
    assert scripts.run("logs", RUN).out == log.decode()
    before = cloud.objects[BUCKET, f"infra/{RUN}/state"].generation
    again = scripts.run("submit", "smoke", "--no-plan", "--run-id", RUN)
    assert again.code == 0
    assert "was submitted before and is active" in again.err
    assert cloud.objects[BUCKET, f"infra/{RUN}/state"].generation == before
    assert cloud.machines.history == []


@pytest.mark.slow
def test_logs_follow_a_run_across_machines(cloud: Cloud, scripts: Scripts) -> None:
    submitted(cloud, phase="run")
    cloud.put(BUCKET, f"infra/{RUN}/logs/1-0.log", b"one\ntw")
    following = scripts.start("logs", RUN, "--follow")
    assert following.stdout is not None
    assert following.stdout.readline() == "one\n"
    cloud.put(BUCKET, f"infra/{RUN}/logs/1-0.log", b"one\ntwo\n")
    assert following.stdout.readline() == "two\n"
    submitted(cloud, phase="run", attempt="2")
    cloud.put(BUCKET, f"infra/{RUN}/logs/2-0.log", b"three\n")
    assert following.stdout.readline() == "three\n"
    cloud.put(BUCKET, f"infra/{RUN}/logs/2-0.log", b"three\nfour\n")
    submitted(cloud, phase="ended", attempt="2", outcome="done", reason="done")
    rest, err = following.communicate(timeout=300)
    assert rest == "four\n", err
    assert following.returncode == 0
