"""startup.sh under a real systemd in its own namespaces: units as a VM starts and stops them."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.infra.test_startup import (
    MARKS,
    docker,
    marks,
    vm_with_stand_in_docker,
    wait_for,
    wait_for_deletion,
)
from tests.infra.vm import Vm
from tests.services.cloud import BUCKET, Cloud

# Systemd moves all processes of its control group, so it gets a group without other processes.
MANAGER = """
group=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)/job-test-$$
mkdir "$group"
echo "$group" >"$0/group"
echo $$ >"$group/cgroup.procs"
exec unshare --mount --pid --fork --kill-child --mount-proc --cgroup bash -ec '
  mount -t tmpfs tmpfs /sys/fs/cgroup
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
  mount -t tmpfs tmpfs /run/systemd
  mkdir /run/systemd/system
  /usr/lib/systemd/systemd --user --log-target=console &
  wait
' "$0"
"""
# Units call the tools inside the namespaces, and the tests call them outside.
TOOL = """#!/bin/bash
enter=(nsenter -t {process} -m -p -C)
[[ -z ${{INSIDE:-}} ]] || enter=()
export INSIDE=yes XDG_RUNTIME_DIR={folder}/runtime
if [[ $0 == */systemd-run ]]; then
  while IFS= read -r -d '' variable; do set -- "--setenv=$variable" "$@"; done < <(env -0)
fi
"${{enter[@]}}" /usr/bin/"${{0##*/}}" --user "$@"
"""


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Path]:
    """A folder with `systemd-run` and `systemctl` for a manager in its own namespaces."""
    if os.geteuid() != 0 or not Path("/usr/lib/systemd/systemd").exists():
        pytest.skip("needs root and systemd, which are not Python packages")
    folder = tmp_path / "manager"
    (folder / "runtime").mkdir(parents=True, mode=0o700)
    (folder / "systemd").mkdir()
    (folder / "systemd" / "user.conf").write_text("[Manager]\nDefaultStartLimitIntervalSec=0\n")
    environment = {
        **os.environ,
        "XDG_RUNTIME_DIR": str(folder / "runtime"),
        "XDG_CONFIG_HOME": str(folder),
    }
    with (folder / "log").open("wb") as log:
        manager = subprocess.Popen(
            ["bash", "-ec", MANAGER, str(folder)], env=environment, stdout=log, stderr=log
        )
    try:
        yield tools_of(manager, folder)
    finally:
        manager.kill()
        manager.wait()
        remove_group(Path((folder / "group").read_text().strip()))


def remove_group(group: Path) -> None:
    """Remove a control group once its last process has exited."""
    deadline = time.monotonic() + 30
    while group.exists() and time.monotonic() < deadline:
        with suppress(OSError):
            for path in sorted(group.rglob("*/"), reverse=True):
                path.rmdir()
            group.rmdir()
        time.sleep(0.1)


def tools_of(manager: subprocess.Popen[bytes], folder: Path) -> Path:
    """Wait until the manager runs, and write the commands that talk to it."""
    children = Path(f"/proc/{manager.pid}/task/{manager.pid}/children")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and manager.poll() is None:
        tools = folder / "tools"
        tools.mkdir(exist_ok=True)
        process = children.read_text().strip()
        for name in ("systemd-run", "systemctl"):
            (tools / name).write_text(TOOL.format(process=process, folder=folder))
            (tools / name).chmod(0o755)
        status = [str(tools / "systemctl"), "is-system-running"]
        if process and subprocess.run(status, capture_output=True, check=False).returncode == 0:
            return tools
        time.sleep(0.1)
    pytest.skip(f"systemd does not run here: {(folder / 'log').read_text()[-300:]}")


@pytest.fixture
def vm(cloud: Cloud, tmp_path: Path, systemd: Path) -> Iterator[Vm]:
    machine = vm_with_stand_in_docker(cloud, tmp_path, systemd)
    machine.environment["DOCKER_GROUP"] = "/sys/fs/cgroup/containers"
    yield machine
    machine.destroy()


def test_a_shutdown_ends_the_job_after_its_checkpoint(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    vm.boot()
    wait_for(vm, "secret")
    vm.shut_down()
    assert docker(vm, "code").strip() == "75"
    log = cloud.objects[BUCKET, "infra/r1/logs/2-0.log"].data.decode()
    assert "stopping\n" in log
    assert "startup: shutting down" in log
    assert marks(cloud) == []


def test_a_killed_unit_follows_the_running_job(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    vm.boot()
    wait_for(vm, "secret")
    log = vm.folder / "job" / "log"
    os.utime(log, (1000, 1000))
    kill_job(vm)
    vm.wait_until(lambda: "following the running container" in log.read_text(), "a second start")
    vm.wait_until(lambda: "logs -f --since 1000 job" in docker(vm, "calls"), "its log")
    assert docker(vm, "calls").count("run -i") == 1
    assert marks(cloud) == []


def kill_job(vm: Vm) -> None:
    kill = ["systemctl", "kill", "--signal=KILL", "--kill-who=main", "job.service"]
    subprocess.run(kill, env=vm.environment, check=True)


def test_the_deadline_stops_a_job_whose_unit_waits_for_a_restart(cloud: Cloud, vm: Vm) -> None:
    (vm.folder / "docker" / "codes").write_text("wait\n")
    vm.metadata.attributes["job-max-seconds"] = "20"
    vm.environment["JOB_VM_PAUSE"] = "1000"
    vm.boot()
    wait_for(vm, "secret")
    kill_job(vm)
    wait_for_deletion(cloud, vm)
    assert docker(vm, "code").strip() == "75"


def test_the_deadline_does_not_wait_for_docker(cloud: Cloud, vm: Vm, systemd: Path) -> None:
    units = systemd.parent / "systemd" / "user"
    units.mkdir()
    service = "[Service]\nType=oneshot\nTimeoutStartSec=infinity\nExecStart=/bin/sleep 1000\n"
    (units / "docker.service").write_text(service)
    start = ["systemctl", "start", "--no-block", "docker.service"]
    subprocess.run(start, env=vm.environment, check=True)
    vm.metadata.attributes["job-max-seconds"] = "3"
    vm.boot()
    wait_for_deletion(cloud, vm)
    assert marks(cloud) == [f"{MARKS}124"]


def test_the_deadline_deletes_what_nothing_else_ends(cloud: Cloud, vm: Vm) -> None:
    vm.metadata.faults.add("GET /computeMetadata", status=503, times=12)
    cloud.faults.add("DELETE /v2/", status=403, times=9)
    (vm.folder / "docker" / "image").unlink()
    (vm.folder / "docker" / "hanging").touch()
    vm.metadata.attributes["job-max-seconds"] = "5"
    vm.boot()
    vm.wait_until(lambda: len(cloud.requested("DELETE /v2/")) >= 11, "11 requests to delete", 180)
    assert marks(cloud) == [f"{MARKS}124"]
    assert not vm.is_active("job")
    assert vm.is_active("job-delete")
