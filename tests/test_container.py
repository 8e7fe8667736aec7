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
from datetime import datetime, timedelta
from itertools import pairwise
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
GRACE_SECONDS = 22
"""Docker is told to wait for 25 seconds."""
MOMENTS: tuple[tuple[signal.Signals, str, dict[str, object]], ...] = (
    (signal.SIGTERM, "job started", {}),  # JAX is imported next
    (signal.SIGINT, "stage started", {"stage": "data"}),
    (signal.SIGTERM, "stage started", {"stage": "baseline"}),  # Keras is imported next
    (signal.SIGTERM, "step", {"step": 10}),
    (signal.SIGKILL, "step", {"step": 30}),
    (signal.SIGTERM, "answered", {"stage": "finetuned"}),
)
TOKEN = "hf_" + "aTokenThatMustNotBeSeen" * 2

Event = dict[str, Any]


def docker(*arguments: str, check: bool = True) -> str:
    """The output of a docker command that ends soon."""
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


def run(
    *options: str,
    image: str = CPU,
    arguments: tuple[str, ...] = (),
    then: Callable[[str, Event], bool] = lambda name, event: False,
) -> tuple[Done, float]:
    """Run a container to its end.

    Args:
        then: called with the container's name and each log line, until it says that it has done
            to the container what it wants to do.

    Returns:
        What came of it, and the seconds from that moment to its end.
    """
    name = f"job-test-{uuid.uuid4().hex[:12]}"
    command = ["docker", "run", "--rm", "--name", name, *options, image, *arguments]
    lines, moment = [], None
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for line in process.stdout:
                lines.append(line)
                now = time.monotonic()
                if moment is None and line.startswith("{") and then(name, json.loads(line)):
                    moment = now
            err = process.stderr.read()
            code = process.wait(30)
        finally:
            docker("rm", "--force", name, check=False)
    return Done(code, "".join(lines), err), time.monotonic() - (moment or 0)


def check_health(name: str) -> None:
    """A container that gets on is healthy, and one that does not is not."""
    docker("exec", name, "healthcheck")
    stale = "JOB_HEARTBEAT_FILE=/tmp/old; touch -d '1 hour ago' /tmp/old; ! healthcheck"
    docker("exec", name, "sh", "-ac", stale)


def at(number: signal.Signals, message: str, **fields: object) -> Callable[[str, Event], bool]:
    """Send the container a signal at the first log line like this."""

    def then(name: str, event: Event) -> bool:
        if not event["message"].startswith(message) or event | fields != event:
            return False
        if number == signal.SIGKILL:
            check_health(name)
        docker("kill", f"--signal={number.name}", name)
        return True

    return then


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree as a checkout of its own, with a file that no image may hold."""
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
    """The run that the README's two commands leave, and what they said."""
    section = (ROOT / "README.md").read_text("utf-8").partition("## In a container\n")[2]
    (commands,) = re.findall(r"```sh\n(.*?)```", section.partition("\n## ")[0], re.S)[:1]
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
    """A volume for the caches."""
    name = docker("volume", "create").strip()
    yield name
    docker("volume", "rm", name)


def made_by_models(folder: Path) -> dict[str, bytes]:
    """The adapter and every prediction of a run."""
    paths = [*folder.rglob("adapter/*.h5"), *folder.rglob("predictions.jsonl")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_commands_of_the_readme_leave_a_whole_run_of_the_user_who_ran_them(
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


def lines_of_the_job(done: Done) -> list[str]:
    """All lines but those of the build before it."""
    lines = done.out.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith('{"severity"')) :]


def test_each_line_is_one_that_cloud_logging_takes_apart_and_none_is_long_in_coming(
    unbroken: tuple[Path, Done],
) -> None:
    events = [json.loads(line) for line in lines_of_the_job(unbroken[1])]
    assert all(list(event)[:3] == ["severity", "time", "message"] for event in events)
    step = next(event for event in events if event["message"] == "step")
    assert step["logging.googleapis.com/labels"]["stage"] == "train"
    times = [datetime.fromisoformat(event["time"]) for event in events]
    assert max(later - former for former, later in pairwise(times)) <= timedelta(minutes=1)


def test_stopped_and_killed_anywhere_a_run_in_a_bucket_ends_with_the_same_bytes(
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
            done, seconds = run(*options, arguments=arguments, then=at(number, message, **fields))
            print(f"{number.name} at '{message}' {fields}: exit code after {seconds:.1f} s")
            assert done.code == (137 if number == signal.SIGKILL else 75), done.out + done.err
            assert TOKEN not in done.out + done.err
            resumed += len(done.stages("resumed from a checkpoint"))
            assert "here/r/results.json" not in bucket.names("runs")
            if number == signal.SIGKILL:
                time.sleep(LEASE_SECONDS)
            else:
                assert "run the same command to resume" in done.err
                assert seconds < GRACE_SECONDS
        assert resumed == 2
        done, _ = run(*options, arguments=arguments)
        assert done.code == 0, done.out + done.err
        fetched = job("fetch", "gs://runs/here/r", str(tmp_path / "r"))
    assert fetched.code == 0, fetched.err
    assert made_by_models(tmp_path / "r") == made_by_models(unbroken[0])


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3])
def test_a_stop_while_the_container_starts_is_not_lost(seconds: float) -> None:
    name = docker("run", "--detach", *LOCKED_DOWN, CPU, "run", "smoke", "--output=/tmp/r").strip()
    try:
        while len(docker("top", name).splitlines()) < 3:  # the kernel drops signals to a bare init
            time.sleep(0.01)
        time.sleep(seconds)
        docker("kill", "--signal=TERM", name)
        assert docker("wait", name).strip() == "75"
    finally:
        docker("rm", "--force", name)


def test_a_container_whose_memory_is_used_up_says_so_last() -> None:
    memory = ("--memory=250m", "--memory-swap=250m")
    done, _ = run(*LOCKED_DOWN, *memory, arguments=("run", "smoke", "--output=/tmp/r"))
    assert done.code == 137, done.out + done.err
    assert done.events[-1]["severity"] == "ERROR"
    assert "the container's memory (262144000 bytes) is used up" in done.events[-1]["message"]


def test_the_tpu_image_without_a_tpu_exits_3_and_says_what_was_looked_for() -> None:
    done, _ = run(*LOCKED_DOWN, image=TPU, arguments=("run", "smoke", "--output=/tmp/r"))
    assert done.code == 3, done.out + done.err
    (message,) = (line for line in done.err.splitlines() if line.startswith("error: "))
    print(message)
    assert "JAX_PLATFORMS='tpu'" in message
    assert "/sys/bus/pci/devices" in message
    assert "--privileged --net=host" in message


def test_a_container_that_can_write_nowhere_says_what_to_add() -> None:
    done, _ = run("--read-only", arguments=("run", "smoke"))
    assert (done.code, done.out) == (3, "")
    assert "--tmpfs /tmp" in done.err


def test_the_spec_may_be_in_the_environment_and_no_argument_means_run() -> None:
    done, _ = run("--env=JOB_SPEC=name: x\nmodel: 3\n")
    assert done.code == 2
    assert done.err.startswith("error: JOB_SPEC:")


@pytest.mark.parametrize("image", [CPU, TPU])
def test_an_image_is_small_and_holds_what_it_is_made_of(
    image: str, unbroken: tuple[Path, Done]
) -> None:
    (found,) = json.loads(docker("image", "inspect", image))
    print(f"{image}: {found['Size'] / 1e9:.3f} GB")
    assert found["Size"] <= LIMITS[image]
    assert found["Config"]["User"] == "job"
    labels = found["Config"]["Labels"]
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


def test_help_comes_at_once() -> None:
    times = []
    for _ in range(3):
        clock = time.monotonic()
        assert "Exit codes" in docker("run", "--rm", CPU, "--help")
        times.append(time.monotonic() - clock)
    print(f"--help: {min(times):.2f} s")
    assert min(times) < 1.5


def test_the_bill_of_materials_names_every_package(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "docker/sbom.sh", CPU], capture_output=True, text=True, timeout=60, check=True
    )
    bill = json.loads(done.stdout)
    assert bill["bomFormat"] == "CycloneDX"
    names = {component["purl"].partition("?")[0] for component in bill["components"]}
    lock = (ROOT / "docker/requirements-cpu.lock").read_text("utf-8")
    for name, version in re.findall(r"^([a-z0-9.-]+)==(\S+)", lock, re.M):
        assert f"pkg:pypi/{name}@{version}" in names
    assert any(name.startswith("pkg:deb/debian/tini@") for name in names)
