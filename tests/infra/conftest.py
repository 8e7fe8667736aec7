"""Fixtures that run the scripts of infra/ with the real gcloud against a local cloud."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.command import Done
from tests.services.cloud import BUCKET, PROJECT, Cloud

INFRA = Path(__file__).parents[2] / "infra"
ZONES = "us-west4-a us-central1-a"
DIGEST = "sha256:" + "1" * 64


@dataclass
class Scripts:
    """Runs scripts in an environment that reaches only the local cloud."""

    cloud: Cloud
    folder: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, script: str, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        """Start a script in its own process group."""
        process = subprocess.Popen(
            ["bash", str(INFRA / f"{script}.sh"), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environment, **settings},
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, script: str, *arguments: str, stdin: str = "", **settings: str) -> Done:
        """Run a script until it exits."""
        done = subprocess.run(
            ["bash", str(INFRA / f"{script}.sh"), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            env={**self.environment, **settings},
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def end(self) -> None:
        """Kill the scripts that are still running."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def settings(cloud: Cloud, folder: Path) -> dict[str, str]:
    """Return variables for a user with a project and a bucket. The watcher does not wait."""
    names = ("PATH", "HOME", "LANG", "PYENV_ROOT", "JOB_CACHE", "SSL_CERT_FILE")
    inherited: Mapping[str, str] = os.environ
    return {
        **{name: inherited[name] for name in names if name in inherited},
        **cloud.environment(folder),
        "TMPDIR": str(folder),
        "INFRA_CONFIG": str(folder / "config.env"),
        "JOB": f"{sys.executable} -m job",
        "PROJECT": PROJECT,
        "BUCKET": BUCKET,
        "ZONES": ZONES,
        "POLL_SECONDS": "0.1",
        "BACKOFF_SECONDS": "0",
        "SETTLE_SECONDS": "0",
    }


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with Cloud() as service:
        service.admin.tags["tpu"] = DIGEST
        service.admin.add_repository("job", f"projects/{PROJECT}/locations/us-west4")
        yield service


@pytest.fixture
def scripts(cloud: Cloud, tmp_path: Path) -> Iterator[Scripts]:
    if shutil.which("gcloud") is None:
        pytest.skip("needs gcloud, which is not a Python package: install the Google Cloud CLI")
    (tmp_path / "config.env").write_text("# no settings\n")
    runner = Scripts(cloud, tmp_path, settings(cloud, tmp_path))
    yield runner
    runner.end()
