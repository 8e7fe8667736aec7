"""startup.sh with a metadata server, a local cloud, and stand-ins for Docker and systemd."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.infra.conftest import INFRA
from tests.infra.vm import Vm
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
def vm(cloud: Cloud, tmp_path: Path) -> Iterator[Vm]:
    machine = vm_with_stand_in_docker(cloud, tmp_path)
    yield machine
    machine.destroy()


def vm_with_stand_in_docker(cloud: Cloud, folder: Path, tools: Path | None = None) -> Vm:
    """Create a VM of attempt 2 of the run r1."""
    cloud.admin.secrets["job-hf-token"] = [SECRET]
    docker = folder / "docker"
    (folder / "bin").mkdir()
    docker.mkdir()
    (folder / "bin" / "docker").symlink_to(STAND_IN)
    (docker / "image").touch()
    (docker / "job").write_text(JOB)
    (docker / "job").chmod(0o755)
    (docker / "codes").write_text("0\n")
    attributes = {
        "startup-script": (INFRA / "startup.sh").read_text(),
        "job-project": "test-project",
        "job-run": "r1",
        "job-attempt": "2",
        "job-control": f"gs://{BUCKET}/infra/r1",
        "job-spec": f"gs://{BUCKET}/infra/r1/spec.yaml",
        "job-output": f"gs://{BUCKET}/runs",
        "job-image": "us-docker.pkg.dev/p/job/job@sha256:1",
        "job-secrets": "HF_TOKEN=projects/p/secrets/job-hf-token "
        "OPENROUTER_API_KEY=projects/p/secrets/job-openrouter-api-key",
        "job-max-seconds": "600",
        "job-container-flags": "--net=host",
        "job-delete": "tpu v2/projects/p/locations/us-west4-a/queuedResources/job-r1?force=true",
    }
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "DOCKER_FOLDER": str(docker),
    }
    return Vm(cloud, attributes, folder, "job", environment, tools)


def docker(vm: Vm, name: str) -> str:
    return (vm.folder / "docker" / name).read_text()


def marks(cloud: Cloud) -> list[str]:
    return [name for name in cloud.names(BUCKET) if "/marks/" in name]


def wait_for(vm: Vm, name: str) -> None:
    vm.wait_until((vm.folder / "docker" / name).exists, name)


def wait_for_deletion(cloud: Cloud, vm: Vm, times: int = 1) -> None:
    vm.wait_until(lambda: len(cloud.requested("DELETE /v2/")) >= times, f"DELETE {times} times")


def test_job_gets_secrets_and_writes_log_and_exit_code(cloud: Cloud, vm: Vm) -> None:
    vm.run()
    assert docker(vm, "arguments") == (
        f"run gs://{BUCKET}/infra/r1/spec.yaml --output gs://{BUCKET}/runs --run-id r1\n"
    )
    assert docker(vm, "secret") == f"{SECRET}\n"
    assert marks(cloud) == [f"{MARKS}0"]
    log = cloud.objects[BUCKET, "infra/r1/logs/2-0.log"].data.decode()
    assert "plain words" in log
    structured, plain = [
        entry for entry in cloud.admin.log_entries if "startup:" not in entry.get("textPayload", "")
    ]
    assert structured["severity"] == "INFO"
    assert structured["timestamp"] == "2026-01-01T00:00:00Z"
    assert structured["jsonPayload"] == {"message": "working"}
    assert plain == {"textPayload": "plain words"}
    wait_for_deletion(cloud, vm)
    assert cloud.requested("DELETE /v2/projects/p/locations/us-west4-a/queuedResources")

    # A boot after the end runs no job.
    vm.run()
    assert docker(vm, "arguments").count("run ") == 1
    assert marks(cloud) == [f"{MARKS}0"]


def test_secrets_are_in_no_argument_file_request_or_log(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "image").unlink()
    (vm.folder / "docker" / "codes").write_text("wait\n")
    vm.boot()
    wait_for(vm, "secret")
    arguments = vm.command_lines()
    assert b"startup.sh" in arguments
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
    assert docker(vm, "login").strip() == TOKEN
    assert docker(vm, "login-file-system").strip() == "tmpfs"
    assert not Path(docker(vm, "login-config")).exists()


def test_a_job_that_stopped_early_resumes_on_the_same_vm(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("75\n75\n0\n")
    vm.run()
    assert docker(vm, "arguments").count("run ") == 3
    assert marks(cloud) == [f"{MARKS}0"]


def test_a_script_started_twice_runs_one_job(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    vm.boot()
    wait_for(vm, "secret")
    vm.boot()
    vm.wait_until(lambda: not vm.is_active("job-deadline"), "the end of the second boot")
    assert vm.is_active("job")
    assert docker(vm, "arguments").count("run ") == 1
    assert docker(vm, "calls").count("run -i") == 1


def test_a_vm_shutdown_gives_the_job_time_to_stop(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    vm.boot()
    wait_for(vm, "secret")
    vm.shut_down()
    assert docker(vm, "code").strip() == "75"
    assert "stopping" in cloud.objects[BUCKET, "infra/r1/logs/2-0.log"].data.decode()
    assert marks(cloud) == []


def test_a_job_past_its_maximum_time_is_stopped(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    vm.metadata.attributes["job-max-seconds"] = "1"
    vm.boot()
    wait_for_deletion(cloud, vm)
    assert docker(vm, "code").strip() == "75"
    assert marks(cloud) == [f"{MARKS}124"]


def test_a_failed_pull_is_reported_and_the_vm_deleted(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "image").unlink()
    (vm.folder / "docker" / "unreachable").touch()
    vm.run()
    assert marks(cloud) == [f"{MARKS}125"]
    assert b"cannot pull the image" in cloud.objects[BUCKET, f"{MARKS}125"].data
    log = cloud.objects[BUCKET, "infra/r1/logs/2-0.log"].data.decode()
    assert log.count("manifest unknown") == 5
    assert "startup: exit code 125: cannot pull" in log
    wait_for_deletion(cloud, vm)


def test_a_container_that_cannot_be_created_is_reported(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "uncreatable").touch()
    vm.run()
    assert marks(cloud) == [f"{MARKS}125"]


def test_a_full_disk_keeps_neither_the_machine_nor_the_mark(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    disk = vm.folder / "job"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs a mount, which only root may do")
    try:
        vm.boot()
        vm.wait_until(lambda: docker(vm, "codes") == "", "the job")
        with suppress(OSError), (disk / "filler").open("wb", 0) as filler:
            while filler.write(b"x" * 512):
                pass
        os.kill(int(docker(vm, "pid")), signal.SIGTERM)
        # The job exits with 75 and starts again.
        (vm.folder / "docker" / "job").write_text("#!/bin/sh\nexit 4\n")
        wait_for_deletion(cloud, vm, times=2)
        assert marks(cloud) == [f"{MARKS}4"]
        # So is a machine that boots with a full disk.
        vm.shut_down()
        vm.run()
        assert marks(cloud) == [f"{MARKS}4"]
    finally:
        vm.destroy()
        subprocess.run(["umount", str(disk)], check=True)


def test_only_the_first_host_of_a_slice_deletes_it(cloud: Cloud, vm: Vm) -> None:
    vm.metadata.attributes["agent-worker-number"] = "1"
    vm.run()
    assert marks(cloud) == ["infra/r1/marks/exit-2-1-0"]
    assert not cloud.requested("DELETE /v2/")


def test_every_host_of_a_slice_deletes_it_at_the_deadline(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    vm.metadata.attributes |= {"agent-worker-number": "1", "job-max-seconds": "1"}
    vm.boot()
    wait_for_deletion(cloud, vm)


def test_a_boot_waits_for_the_metadata_server(cloud: Cloud, vm: Vm) -> None:
    vm.metadata.faults.add("GET /computeMetadata", status=503, times=12)
    vm.run()
    assert "waiting for the metadata server" in vm.serial
    assert marks(cloud) == [f"{MARKS}0"]


def test_a_refused_deletion_is_repeated_until_it_works(cloud: Cloud, vm: Vm) -> None:
    cloud.faults.add("DELETE /v2/", status=403, times=9)
    vm.run()
    wait_for_deletion(cloud, vm, times=10)
    assert marks(cloud) == [f"{MARKS}0"]


def test_a_clock_that_was_wrong_moves_no_deadline(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    (vm.folder / "job").mkdir()
    (vm.folder / "job" / "deadline").write_text(f"{int(time.time()) + 86400}\n")
    vm.metadata.attributes["job-max-seconds"] = "1"
    vm.boot()
    wait_for_deletion(cloud, vm)


def test_a_failed_upload_of_the_log_is_repeated(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    cloud.faults.add("logs%2F2-0.log", status=403, times=2)
    vm.boot()
    name = "infra/r1/logs/2-0.log"
    vm.wait_until(lambda: name in cloud.names(BUCKET), "an upload of the log")
    assert "plain words" in cloud.objects[BUCKET, name].data.decode()
    assert "cannot upload the log" in vm.serial


def test_a_hanging_pull_ends_at_the_deadline(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "image").unlink()
    (vm.folder / "docker" / "hanging").touch()
    vm.metadata.attributes["job-max-seconds"] = "3"
    vm.boot()
    wait_for_deletion(cloud, vm)
    assert marks(cloud) == [f"{MARKS}124"]
    assert "pulling" in cloud.objects[BUCKET, "infra/r1/logs/2-0.log"].data.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_docker_daemon_that_stops_resumes_the_job(
    cloud: Cloud, vm: Vm, number: signal.Signals
) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n0\n")
    vm.boot()
    vm.wait_until(lambda: docker(vm, "codes") == "0\n", "the job")
    (vm.folder / "docker" / "down").touch()
    os.kill(int(docker(vm, "pid")), number)
    vm.wait_until(lambda: "Docker has stopped" in vm.serial, "a log line")
    assert marks(cloud) == []
    (vm.folder / "docker" / "down").unlink()
    vm.wait_until(lambda: not vm.is_active("job"), "the end of the job")
    assert docker(vm, "arguments").count("run ") == 2
    assert marks(cloud) == [f"{MARKS}0"]


def test_a_docker_daemon_that_restarts_at_once_resumes_the_job(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n0\n")
    (vm.folder / "systemd" / "docker-process").write_text("MainPID=100\n")
    vm.boot()
    vm.wait_until(lambda: docker(vm, "codes") == "0\n", "the job")
    (vm.folder / "systemd" / "docker-process").write_text("MainPID=200\n")
    os.kill(int(docker(vm, "pid")), signal.SIGKILL)
    vm.wait_until(vm.is_done, "the end of the job")
    assert marks(cloud) == [f"{MARKS}0"]


def test_docker_is_installed_with_patience_for_apt(cloud: Cloud, vm: Vm) -> None:
    folder = vm.folder / "bin"
    (folder / "docker").rename(folder / "docker-of-apt")
    (folder / "apt-get").write_text(
        f'#!/bin/sh\n[ "$2" = DPkg::Lock::Timeout=300 ] || exit 100\n'
        # Apt does not wait for the lock of its lists.
        f"[ -e {folder}/first ] || {{ touch {folder}/first; exit 100; }}\n"
        f'[ "$3" = update ] || mv {folder}/docker-of-apt {folder}/docker\n'
    )
    (folder / "apt-get").chmod(0o755)
    vm.environment["PATH"] = f"{vm.folder / 'tools'}:{folder}:{vm.folder / 'system'}"
    (vm.folder / "system").mkdir()
    for tools in (Path("/usr/bin"), Path("/bin")):
        for tool in tools.iterdir():
            link = vm.folder / "system" / tool.name
            if not tool.name.startswith("docker") and not link.exists():
                link.symlink_to(tool)
    vm.run()
    assert "installing Docker" in vm.serial
    assert marks(cloud) == [f"{MARKS}0"]
