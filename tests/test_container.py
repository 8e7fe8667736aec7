"""The images as users run them: locked down, stopped, killed, out of memory, without a TPU.

`docker/test.sh` builds the images and runs these tests.
"""

import json
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from job import __version__
from tests.command import Done, job
from tests.services.bucket import Bucket

pytestmark = pytest.mark.docker
ROOT = Path(__file__).parent.parent
CPU, TPU = "job:cpu", "job:tpu"
LIMITS = {CPU: 1.3e9, TPU: 2.0e9}
LOCKED_DOWN = (
    "--read-only", "--tmpfs=/tmp", "--user=12345:23456", "--cap-drop=ALL",
    "--security-opt=no-new-privileges", "--network=host",
)  # fmt: skip
LEASE_SECONDS = 5
MOMENTS: tuple[tuple[signal.Signals, str, dict[str, object]], ...] = (
    (signal.SIGTERM, "job started", {}),  # JAX is imported next
    (signal.SIGINT, "stage started", {"stage": "data"}),
    (signal.SIGTERM, "stage started", {"stage": "baseline"}),  # Keras is imported next
    (signal.SIGTERM, "step", {"step": 10}),
    (signal.SIGKILL, "step", {"step": 30}),
    (signal.SIGTERM, "task evaluated", {"stage": "finetuned"}),
)
TOKEN = "hf_" + "aTokenThatMustNotBeSeen" * 2
Event = dict[str, Any]


def docker(*arguments: str, check: bool = True) -> str:
    """Return the output of a short docker command."""
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


def run(
    *options: str,
    image: str = CPU,
    arguments: tuple[str, ...] = (),
    act: Callable[[str, Event], bool] = lambda name, event: False,
) -> Done:
    """Run a container until it exits.

    Args:
        act: called with the container's name and each log line until it returns True.
    """
    name = f"job-test-{uuid.uuid4().hex[:12]}"
    command = ["docker", "run", "--rm", "--name", name, *options, image, *arguments]
    lines, acted = [], False
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for line in process.stdout:
                lines.append(line)
                if not acted and line.startswith("{"):
                    acted = act(name, json.loads(line))
            err = process.stderr.read()
            code = process.wait(120)
        finally:
            docker("rm", "--force", name, check=False)
    return Done(code, "".join(lines), err)


def check_health(name: str) -> None:
    """Check that the container is healthy, and unhealthy without recent progress."""
    docker("exec", name, "healthcheck")
    stale = "JOB_HEARTBEAT_FILE=/tmp/old; touch -d '1 hour ago' /tmp/old; ! healthcheck"
    docker("exec", name, "sh", "-ac", stale)


def stop_at(number: signal.Signals, message: str, **fields: object) -> Callable[[str, Event], bool]:
    """Stop the container at the first log line with this message and these fields.

    SIGTERM comes from `docker stop`, which kills the container after 25 seconds (exit code 137).
    """

    def act(name: str, event: Event) -> bool:
        if not event["message"].startswith(message) or event | fields != event:
            return False
        if number == signal.SIGKILL:
            check_health(name)
        if number == signal.SIGTERM:
            docker("stop", "-t", "25", name)
        else:
            docker("kill", f"--signal={number.name}", name)
        return True

    return act


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree, with a secret file that no image may contain."""
    folder = tmp_path_factory.mktemp("checkout") / "job"
    subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, folder], check=True)
    changed = subprocess.run(
        ["git", "ls-files", "--modified", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in changed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
        (folder / name).chmod((ROOT / name).stat().st_mode)
    (folder / "job/.env").write_text(TOKEN)
    return folder


@pytest.fixture(scope="module")
def unbroken(checkout: Path) -> tuple[Path, Done]:
    """The run and the output of the first two commands in docker/README.md."""
    text = (ROOT / "docker/README.md").read_text("utf-8")
    commands = re.findall(r"```sh\n(.*?)```", text, re.S)[0]
    assert len(commands.strip().splitlines()) == 2
    done = subprocess.run(
        ["bash", "-euc", commands],
        cwd=checkout, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (path for path in (checkout / "runs").iterdir() if path.name != "datasets")
    return folder, Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def cache() -> Iterator[str]:
    """A Docker volume for the caches."""
    name = docker("volume", "create").strip()
    yield name
    docker("volume", "rm", name)


def model_outputs(folder: Path) -> dict[str, bytes]:
    """Return the adapter and all predictions of a run."""
    paths = [*folder.rglob("adapter/*.h5"), *folder.rglob("predictions.jsonl")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_readme_commands_finish_a_run_owned_by_the_user(
    unbroken: tuple[Path, Done], checkout: Path
) -> None:
    folder, _ = unbroken
    assert {path.stat().st_uid for path in folder.rglob("*")} == {os.getuid()}
    environment = json.loads((folder / "results.json").read_bytes())["environment"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert environment["git_commit"].removesuffix("-dirty") == head
    assert environment["platform"] == "cpu"


def job_lines(done: Done) -> list[str]:
    """Return the lines after the build's output."""
    lines = done.out.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith('{"severity"')) :]


def test_every_log_line_is_structured_for_cloud_logging(unbroken: tuple[Path, Done]) -> None:
    events = [json.loads(line) for line in job_lines(unbroken[1])]
    assert all(list(event)[:3] == ["severity", "time", "message"] for event in events)
    step = next(event for event in events if event["message"] == "step")
    assert step["logging.googleapis.com/labels"]["stage"] == "train"
    assert all(datetime.fromisoformat(event["time"]).tzinfo for event in events)


def test_a_run_stopped_and_killed_anywhere_ends_the_same(
    unbroken: tuple[Path, Done], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        *LOCKED_DOWN, f"--volume={cache}:/cache", "--env=STORAGE_EMULATOR_HOST", "--env=HF_TOKEN",
        f"--env=JOB_LEASE_SECONDS={LEASE_SECONDS}", "--env=JOB_SPEC=gs://runs/smoke.yaml",
    )  # fmt: skip
    arguments = ("run", "--output", "gs://runs/here", "--run-id", "r")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Bucket("runs") as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)
        bucket.put("runs", "smoke.yaml", (ROOT / "job/specs/smoke.yaml").read_bytes())
        resumed = 0
        for number, message, fields in MOMENTS:
            done = run(*options, arguments=arguments, act=stop_at(number, message, **fields))
            assert done.code == (137 if number == signal.SIGKILL else 75), done.out + done.err
            assert TOKEN not in done.out + done.err
            resumed += len(done.stages("resumed from a checkpoint"))
            assert "here/r/results.json" not in bucket.names("runs")
            if number == signal.SIGKILL:
                time.sleep(LEASE_SECONDS)
            else:
                assert "run the same command to resume" in done.err
        assert resumed == 2
        done = run(*options, arguments=arguments)
        assert done.code == 0, done.out + done.err
        fetched = job("fetch", "gs://runs/here/r", str(tmp_path / "r"))
    assert fetched.code == 0, fetched.err
    assert model_outputs(tmp_path / "r") == model_outputs(unbroken[0])


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3])
def test_a_stop_during_startup_is_not_lost(seconds: float) -> None:
    name = docker("run", "--detach", *LOCKED_DOWN, CPU, "run", "smoke", "--output=/tmp/r").strip()
    try:
        # Until tini has started its child, the kernel drops signals to it.
        while len(docker("top", name).splitlines()) < 3:
            time.sleep(0.01)
        time.sleep(seconds)
        docker("kill", "--signal=TERM", name)
        assert docker("wait", name).strip() == "75"
    finally:
        docker("rm", "--force", name)


def test_the_last_log_line_reports_out_of_memory() -> None:
    memory = ("--memory=250m", "--memory-swap=250m")
    done = run(*LOCKED_DOWN, *memory, arguments=("run", "smoke", "--output=/tmp/r"))
    assert done.code == 137, done.out + done.err
    assert done.events[-1]["severity"] == "ERROR"
    assert "the container ran out of memory (limit 262144000 bytes)" in done.events[-1]["message"]


def test_the_tpu_image_without_a_tpu_exits_3_with_a_fix() -> None:
    done = run(*LOCKED_DOWN, image=TPU, arguments=("run", "smoke", "--output=/tmp/r"))
    assert done.code == 3, done.out + done.err
    (message,) = (line for line in done.err.splitlines() if line.startswith("error: "))
    assert "JAX_PLATFORMS='tpu'" in message
    assert "/sys/bus/pci/devices" in message
    assert "docker/README.md has the flags" in message


def test_a_read_only_container_needs_a_writable_tmp() -> None:
    done = run("--read-only", arguments=("run", "smoke"))
    assert (done.code, done.out) == (3, "")
    assert "--tmpfs /tmp" in done.err


def test_job_spec_alone_runs_the_spec_in_the_variable() -> None:
    done = run("--env=JOB_SPEC=name: x\nmodel: 3\n")
    assert done.code == 2
    assert done.err.startswith("error: JOB_SPEC:")


@pytest.mark.parametrize("image", [CPU, TPU])
def test_an_image_is_small_and_has_exactly_the_job_files(
    image: str, unbroken: tuple[Path, Done]
) -> None:
    (description,) = json.loads(docker("image", "inspect", image))
    print(f"{image}: {description['Size'] / 1e9:.3f} GB")
    assert description["Size"] <= LIMITS[image]
    assert description["Config"]["User"] == "job"
    labels = description["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])
    site = "import job, pathlib; p = pathlib.Path(job.__file__).parent; print(*(q.relative_to(p) "
    site += "for q in p.rglob('*') if q.is_file() and q.suffix != '.pyc'), sep='\\n')"
    files = docker("run", "--rm", "--entrypoint=python3", image, "-c", site).splitlines()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "job"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert sorted(f"job/{name}" for name in files) == sorted(listed.stdout.splitlines())


def test_the_container_prints_help() -> None:
    assert "Exit codes" in docker("run", "--rm", CPU, "--help")


def test_the_bill_of_materials_lists_every_package(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "docker/sbom.sh", CPU], capture_output=True, text=True, timeout=300, check=True
    )
    bill = json.loads(done.stdout)
    assert bill["bomFormat"] == "CycloneDX"
    names = {component["purl"].partition("?")[0] for component in bill["components"]}
    lock = (ROOT / "docker/requirements-cpu.lock").read_text("utf-8")
    for name, version in re.findall(r"^([a-z0-9.-]+)==(\S+)", lock, re.M):
        assert f"pkg:pypi/{name}@{version}" in names
    assert any(name.startswith("pkg:deb/debian/tini@") for name in names)
    licenses = {
        part["name"]: part["licenses"][0]["license"]["name"]
        for part in bill["components"]
        if part["purl"].startswith("pkg:pypi/")
    }
    print("\n".join(f"{name}: {text}" for name, text in sorted(licenses.items())))
    assert not {name for name, text in licenses.items() if re.search(r"\bA?GPL", text)}
    assert {name for name, text in licenses.items() if text == "not stated"} <= {"namex"}
