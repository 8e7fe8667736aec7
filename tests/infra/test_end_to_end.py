"""A run with the image: submitted, preempted during training, replaced, finished, fetched.

The scripts and gcloud are real. The local cloud's machines run their startup script, which runs the
CPU image with the smoke spec against the local bucket. `infra/test.sh` runs this test.
"""

import json
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.infra.conftest import Scripts
from tests.infra.runs import check_clean, state_of
from tests.infra.vm import Vm, command_lines, vm_of_machine
from tests.services.cloud import BUCKET, TOKEN, Cloud
from tests.services.cloud_machines import Machine

pytestmark = pytest.mark.docker
SECRET = "hf_secret_of_the_end_to_end_test"
RUN = f"smoke-preempted-{uuid.uuid4().hex[:8]}"
LIMIT = 900


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def wait_until(happened: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not happened():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {LIMIT} s")
        time.sleep(0.2)


@pytest.fixture
def vms(cloud: Cloud, tmp_path: Path) -> Iterator[list[Vm]]:
    """The VMs of the machines that the cloud has granted so far."""
    booted: list[Vm] = []
    running: dict[int, Vm] = {}

    def boot(machine: Machine) -> None:
        vm = vm_of_machine(cloud, machine, tmp_path / "vms", {})
        booted.append(vm)
        running[id(machine)] = vm
        vm.boot()

    def take_away(machine: Machine) -> None:
        if vm := running.pop(id(machine), None):
            vm.destroy()

    cloud.machines.on_boot = boot
    cloud.machines.on_gone = take_away
    yield booted
    for vm in running.values():
        vm.destroy()


def test_a_preempted_run_finishes_on_another_machine(
    cloud: Cloud, scripts: Scripts, vms: list[Vm], tmp_path: Path
) -> None:
    image = docker("image", "inspect", "--format", "{{.Id}}", "job:cpu")
    assert image, "there is no image job:cpu; run infra/test.sh"
    cloud.admin.secrets["job-hf-token"] = [SECRET]
    settings = {
        "IMAGE": image,
        "POLL_SECONDS": "6",  # each gcloud call takes a CPU second, which the job needs
        "CONTAINER_FLAGS": f"--net=host --user root -e STORAGE_EMULATOR_HOST={cloud.url} "
        "-e JOB_LEASE_SECONDS=6",
    }
    arguments = ("smoke", "--no-plan", "--run-id", RUN, "--set", "train.checkpoint_every=5")
    submission = scripts.start("submit", *arguments, "--wait", **settings)

    def checkpoints() -> list[str]:
        return [name for name in cloud.names(BUCKET) if "/train/checkpoints/" in name]

    wait_until(lambda: checkpoints() or submission.poll() is not None, "a checkpoint")
    assert submission.poll() is None, submission.communicate()[1] + vms[0].serial

    # The job has its secret, but no Docker file and no argument has it.
    process = docker("inspect", "--format", "{{.State.Pid}}", vms[0].container)
    assert f"HF_TOKEN={SECRET}".encode() in Path(f"/proc/{process}/environ").read_bytes()
    assert SECRET not in docker("inspect", vms[0].container)
    root = Path(docker("info", "--format", "{{.DockerRootDir}}")) / "containers"
    records = list((root / docker("inspect", "--format", "{{.Id}}", vms[0].container)).rglob("*"))
    assert records
    for path in records:
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()
    arguments = command_lines(submission) + vms[0].command_lines()
    container = docker("top", vms[0].container, "-eo", "pid,args")
    assert RUN in container
    arguments += container.encode()
    assert SECRET.encode() not in arguments
    assert TOKEN.encode() not in arguments

    # Preempt during training: everything on the machine is gone at once.
    [first] = cloud.machines.history
    vms[0].destroy()
    first.state = "SUSPENDED"
    assert f"runs/{RUN}/results.json" not in cloud.names(BUCKET)

    output, errors = submission.communicate(timeout=LIMIT)
    serial = "\n".join(vm.serial for vm in vms)
    assert submission.returncode == 0, errors + serial
    check_clean(cloud, RUN)
    assert [machine.zone for machine in cloud.machines.history] == ["us-west4-a", "us-central1-a"]
    assert state_of(cloud, RUN)["outcome"] == "done"
    assert cloud.requested("DELETE /v2/projects/test-project/locations/us-central1-a")
    assert docker("ps", "--all", "--quiet", "--filter", f"name={RUN}") == ""

    folder = tmp_path / "fetched"
    fetched = scripts.run("fetch", RUN, str(folder))
    assert fetched.code == 0, fetched.err
    assert '"fetched, checksums verified"' in fetched.out
    results = json.loads((folder / "results.json").read_text())
    assert results["run"]["status"] == "complete"
    assert results["run"]["resumes"] == 1
    assert results["environment"]["image"] == image
    assert (folder / "adapter" / "adapter.lora.h5").is_file()
    log = scripts.run("logs", RUN)
    assert '"message": "job started"' in log.out

    for secret in (SECRET, TOKEN):
        assert secret not in output + errors + serial + log.out
        assert not [line for line, body in cloud.bodies if secret in line + body.decode("latin-1")]
    for (_, name), stored in cloud.objects.items():
        assert SECRET.encode() not in stored.data, name
