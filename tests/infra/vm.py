"""VMs of the local cloud: a metadata server, and the startup script run as on a real VM."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest

from tests.services.cloud import PROJECT, TOKEN, Cloud
from tests.services.cloud_machines import Machine
from tests.services.metadata import Metadata

STAND_IN = Path(__file__).with_name("stand_in_systemd.py")


def command_lines(process: subprocess.Popen[Any]) -> bytes:
    """Return the command lines of all processes in the session that `process` leads."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # the process has exited
            if os.getsid(int(path.parent.name)) == process.pid:
                lines.append(path.read_bytes())
    return b"".join(lines)


class Vm:
    """A VM that runs the startup script from its metadata.

    Systemd is a stand-in, unless `tools` is a folder with other `systemd-run` and `systemctl`.
    """

    def __init__(
        self,
        cloud: Cloud,
        attributes: Mapping[str, str],
        folder: Path,
        container: str,
        environment: Mapping[str, str],
        tools: Path | None = None,
    ) -> None:
        self.metadata = Metadata(PROJECT, attributes, TOKEN).start()
        self.folder = folder
        self.container = container
        (folder / "systemd").mkdir(parents=True, exist_ok=True)
        self._script = folder / "startup-script"
        self._script.write_text(self.metadata.attributes["startup-script"])
        if tools is None:
            tools = folder / "tools"
            tools.mkdir()
            for name in ("systemd-run", "systemctl"):
                command = f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" {name} "$@"\n'
                (tools / name).write_text(command)
                (tools / name).chmod(0o755)
        api = cloud.url
        inherited = {"PATH": os.environ["PATH"], **environment}
        self.environment = {
            "HOME": str(folder),
            "GCE_METADATA_HOST": self.metadata.host,
            "STORAGE_EMULATOR_HOST": api,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER": f"{api}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING": f"{api}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"{api}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{api}/compute/v1/",
            "JOB_VM_FOLDER": str(folder / "job"),
            "JOB_VM_MEMORY": str(folder / "memory"),
            "JOB_VM_CONTAINER": container,
            "JOB_VM_TICK": "0.2",
            "JOB_VM_PAUSE": "0.5",
            "SYSTEMD_FOLDER": str(folder / "systemd"),
            **inherited,
            "PATH": f"{tools}:{inherited['PATH']}",
        }
        self._runner: IO[bytes] | None = None

    def boot(self) -> None:
        """Run the startup script as Google's runner does, which keeps what the script writes."""
        (self.folder / "serial").touch()
        script = subprocess.Popen(
            ["bash", str(self._script)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
        )
        self._runner = script.stdout
        threading.Thread(target=self._keep_output, args=(script.stdout,), daemon=True).start()
        assert script.wait(120) == 0, self.serial

    def _keep_output(self, output: IO[bytes]) -> None:
        with suppress(ValueError, OSError), (self.folder / "serial").open("ab", 0) as serial:
            while text := os.read(output.fileno(), 4096):
                serial.write(text)

    def run(self) -> None:
        """Boot, and wait until the job's unit has ended."""
        self.boot()
        self.wait_until(self.is_done, "the end of the job")

    def is_done(self) -> bool:
        """Return whether the job's unit and the one that starts it have ended."""
        return not self.is_active("job-deadline") and not self.is_active("job")

    def wait_until(self, happened: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Wait for something that must happen."""
        deadline = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > deadline:
                pytest.fail(f"{what} did not happen within {seconds} s: {self.serial}")
            time.sleep(0.05)

    def is_active(self, unit: str) -> bool:
        """Return whether a unit is loaded."""
        return self._control("cat", f"{unit}.service") == 0

    def shut_down(self) -> None:
        """Shut down as the operating system does: first Google's runner ends, then the units."""
        if self._runner is not None:
            self._runner.close()
        self._control("stop", "job.service")

    def _control(self, *arguments: str) -> int:
        done = subprocess.run(
            ["systemctl", *arguments], env=self.environment, capture_output=True, check=False
        )
        return done.returncode

    @property
    def serial(self) -> str:
        """The output of the script and its units."""
        files = (self.folder / "serial", self.folder / "systemd" / "journal")
        return "".join(path.read_text() for path in files if path.exists())

    @property
    def processes(self) -> list[int]:
        """The processes that run on this VM."""
        mark = f"JOB_VM_FOLDER={self.environment['JOB_VM_FOLDER']}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # the process has exited
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def command_lines(self) -> bytes:
        """Return the command lines of all processes on this VM."""
        lines = []
        for process in self.processes:
            with suppress(OSError):
                lines.append(Path(f"/proc/{process}/cmdline").read_bytes())
        return b"".join(lines)

    def destroy(self) -> None:
        """Kill everything, as if the machine were gone."""
        while processes := self.processes:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)
        subprocess.run(
            ["docker", "rm", "-f", self.container],
            env=self.environment,
            capture_output=True,
            check=False,
        )
        self.metadata.stop()


def vm_of_machine(
    cloud: Cloud, machine: Machine, folder: Path, environment: Mapping[str, str]
) -> Vm:
    """Create the VM of a machine that the cloud has granted."""
    name = f"{machine.name}-{machine.metadata['job-attempt']}"
    return Vm(cloud, machine.metadata, folder / name, name, environment)
