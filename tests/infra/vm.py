"""VMs of the local cloud: a metadata server, and the startup script run as on a real VM."""

import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.services.cloud import PROJECT, TOKEN, Cloud
from tests.services.cloud_machines import Machine
from tests.services.metadata import Metadata


def command_lines(process: subprocess.Popen[Any]) -> bytes:
    """Return the command lines of all processes in the session that `process` leads."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # the process has exited
            if os.getsid(int(path.parent.name)) == process.pid:
                lines.append(path.read_bytes())
    return b"".join(lines)


class Vm:
    """A VM that runs the startup script from its metadata."""

    def __init__(
        self,
        cloud: Cloud,
        attributes: Mapping[str, str],
        folder: Path,
        container: str,
        environment: Mapping[str, str],
    ) -> None:
        self.metadata = Metadata(PROJECT, attributes, TOKEN).start()
        self.folder = folder
        self.container = container
        self.folder.mkdir(parents=True, exist_ok=True)
        self._script = folder / "startup-script"
        self._script.write_text(self.metadata.attributes["startup-script"])
        api = cloud.url
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "GCE_METADATA_HOST": self.metadata.host,
            "STORAGE_EMULATOR_HOST": api,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER": f"{api}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_LOGGING": f"{api}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"{api}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{api}/compute/v1/",
            "JOB_VM_FOLDER": str(folder / "job"),
            "JOB_VM_CONTAINER": container,
            "JOB_VM_TICK": "0.2",
            "JOB_VM_PAUSE": "0.5",
            **environment,
        }
        self.started: list[subprocess.Popen[bytes]] = []

    def boot(self) -> subprocess.Popen[bytes]:
        """Start the startup script, as at every boot."""
        with (self.folder / "serial").open("ab") as serial:
            process = subprocess.Popen(
                ["bash", str(self._script)],
                stdin=subprocess.DEVNULL,
                stdout=serial,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    @property
    def serial(self) -> str:
        """The script's output."""
        return (self.folder / "serial").read_text()

    def destroy(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Kill the script and its container, as if the machine were gone."""
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            process.wait()
        subprocess.run(
            ["docker", "rm", "-f", self.container],
            env=self._environment,
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
