"""startup.sh with a metadata server, a local cloud and a stand-in for Docker."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.infra.conftest import INFRA
from tests.infra.vm import Vm, command_lines
from tests.services.cloud import BUCKET, TOKEN, Cloud

SECRET = "hf_very_secret_value_for_this_test"
STAND_IN = Path(__file__).with_name("stand-in-docker.sh")
MARKS = "infra/r1/marks/exit-2-0-"

# A job that records its arguments and secret, and exits with the next code in the file `codes`.
JOB = """#!/bin/sh
printf '%s\\n' "$*" >>"$DOCKER_FOLDER/arguments"
printenv HF_TOKEN >"$DOCKER_FOLDER/secret"
echo '{"severity": "INFO", "message": "working", "time": "2026-01-01T00:00:00Z"}'
echo 'plain words'
trap 'echo stopping; exit 75' TERM
code=$(head -n 1 "$DOCKER_FOLDER/codes")
sed -i 1d "$DOCKER_FOLDER/codes"
while [ "$code" = wait ]; do sleep 0.1; done
exit "$code"
"""


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with Cloud() as service:
        service.admin.secrets["job-hf-token"] = [SECRET]
        yield service


@pytest.fixture
def vm(cloud: Cloud, tmp_path: Path) -> Iterator[Vm]:
    docker = tmp_path / "docker"
    (tmp_path / "bin").mkdir()
    docker.mkdir()
    (tmp_path / "bin" / "docker").symlink_to(STAND_IN)
    (docker / "image").touch()
    (docker / "job").write_text(JOB)
    (docker / "job").chmod(0o755)
    (docker / "codes").write_text("0\n")
    attributes = {
        "startup-script": (INFRA / "startup.sh").read_text(),
        "job-run": "r1",
        "job-attempt": "2",
        "job-control": f"gs://{BUCKET}/infra/r1",
        "job-spec": f"gs://{BUCKET}/infra/r1/spec.yaml",
        "job-output": f"gs://{BUCKET}/runs",
        "job-image": "us-docker.pkg.dev/p/job/job@sha256:1",
        "job-secrets": "HF_TOKEN=projects/p/secrets/job-hf-token "
        "OPENROUTER_API_KEY=projects/p/secrets/job-openrouter-api-key",
        "job-max-seconds": "600",
        "job-container-flags": "--privileged --net=host",
        "job-delete": "tpu v2/projects/p/locations/us-west4-a/queuedResources/job-r1?force=true",
    }
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "DOCKER_FOLDER": str(docker),
    }
    machine = Vm(cloud, attributes, tmp_path, "job", environment)
    yield machine
    machine.destroy()


def docker(vm: Vm, name: str) -> str:
    return (vm.folder / "docker" / name).read_text()


def marks(cloud: Cloud) -> list[str]:
    return [name for name in cloud.names(BUCKET) if "/marks/" in name]


def wait_for(vm: Vm, name: str) -> None:
    deadline = time.monotonic() + 60
    while not (vm.folder / "docker" / name).exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_job_gets_secrets_and_writes_log_and_exit_code(cloud: Cloud, vm: Vm) -> None:
    assert vm.boot().wait(120) == 0, vm.serial
    assert docker(vm, "arguments") == (
        f"run gs://{BUCKET}/infra/r1/spec.yaml --output gs://{BUCKET}/runs --run-id r1\n"
    )
    assert docker(vm, "secret") == f"{SECRET}\n"
    assert marks(cloud) == [f"{MARKS}0"]
    log = cloud.objects[BUCKET, "infra/r1/logs/2-0.log"].data.decode()
    assert "plain words" in log
    structured, plain = cloud.admin.log_entries
    assert structured["severity"] == "INFO"
    assert structured["timestamp"] == "2026-01-01T00:00:00Z"
    assert structured["jsonPayload"] == {"message": "working"}
    assert plain == {"textPayload": "plain words"}
    assert len(cloud.requested("DELETE /v2/projects/p/locations/us-west4-a/queuedResources")) == 1

    # A boot after the end runs no job and requests the deletion again.
    assert vm.boot().wait(120) == 0
    assert docker(vm, "arguments").count("run ") == 1
    assert len(cloud.requested("DELETE /v2/")) == 2


def test_secrets_are_in_no_argument_file_request_or_log(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "image").unlink()
    (vm.folder / "docker" / "codes").write_text("wait\n")
    script = vm.boot()
    wait_for(vm, "secret")
    arguments = command_lines(script)
    assert b"startup-script" in arguments
    for secret in (SECRET, TOKEN):
        assert secret.encode() not in arguments
        assert secret not in vm.serial + docker(vm, "calls")
        lines = [line for line, _ in cloud.bodies]
        assert not [line for line in lines if secret in line]
        assert not [body for _, body in cloud.bodies if secret.encode() in body]
    written = [path for path in (vm.folder / "job").rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if SECRET in path.read_text()]
    # The registry's token came through standard input. Its file was in memory and is deleted.
    assert docker(vm, "login") == TOKEN + "\n"
    assert docker(vm, "login-file-system").strip() == "tmpfs"
    assert not Path(docker(vm, "login-config")).exists()


def test_a_job_that_stopped_early_resumes_on_the_same_vm(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("75\n75\n0\n")
    assert vm.boot().wait(120) == 0
    assert docker(vm, "arguments").count("run ") == 3
    assert marks(cloud) == [f"{MARKS}0"]


def test_a_script_started_twice_runs_one_job(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    first = vm.boot()
    wait_for(vm, "arguments")
    assert vm.boot().wait(120) == 0
    assert "already running" in vm.serial
    assert first.poll() is None
    assert docker(vm, "arguments").count("run ") == 1


def test_a_vm_shutdown_gives_the_job_time_to_stop(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    process = vm.boot()
    wait_for(vm, "secret")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(120) == 0
    assert docker(vm, "code").strip() == "75"
    assert "stopping" in cloud.objects[BUCKET, "infra/r1/logs/2-0.log"].data.decode()
    assert marks(cloud) == []


def test_a_job_past_its_maximum_time_is_stopped(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    vm.metadata.attributes["job-max-seconds"] = "1"
    assert vm.boot().wait(120) == 0
    assert marks(cloud) == [f"{MARKS}124"]
    assert cloud.requested("DELETE /v2/")


def test_a_failed_pull_is_reported_and_the_vm_deleted(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "image").unlink()
    (vm.folder / "docker" / "unreachable").touch()
    assert vm.boot().wait(120) == 0
    assert marks(cloud) == [f"{MARKS}125"]
    assert b"cannot pull the image" in cloud.objects[BUCKET, f"{MARKS}125"].data
    assert cloud.requested("DELETE /v2/")


def test_only_the_first_host_of_a_slice_deletes_it(cloud: Cloud, vm: Vm) -> None:
    vm.metadata.attributes["agent-worker-number"] = "1"
    assert vm.boot().wait(120) == 0
    assert marks(cloud) == ["infra/r1/marks/exit-2-1-0"]
    assert not cloud.requested("DELETE /v2/")
