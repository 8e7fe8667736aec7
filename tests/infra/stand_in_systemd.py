"""A stand-in for `systemd-run` and `systemctl` on PATH: services as processes.

It starts, restarts, and stops services as systemd does with `KillMode=mixed`: SIGTERM to the main
process, and SIGKILL to the rest after it has exited or after `TimeoutStopSec`. Units are files in
$SYSTEMD_FOLDER, which hold the process id of the service's supervisor.

Not included: other kinds of units, dependencies, limits, and what a reboot does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

FOLDER = Path(os.environ["SYSTEMD_FOLDER"])


def run(arguments: list[str]) -> None:
    """Create a service, and start it now or after `--on-active` seconds."""
    unit, delay, properties = "", 0.0, {}
    while arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).partition("=")
        if name == "--unit":
            unit = value
        elif name == "--on-active":
            delay = float(value)
        elif name == "--property":
            key, _, value = value.partition("=")
            properties[key] = value
    path = FOLDER / unit
    if path.exists():
        sys.exit(f"Unit {unit}.service was already loaded")
    path.write_text(json.dumps({"command": arguments, "properties": properties}))
    start("timer" if delay else "service", unit, str(delay))


def start(*arguments: str) -> None:
    """Run a command of this script in the background."""
    with (FOLDER / "journal").open("ab") as journal:
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=journal,
            stderr=journal,
            start_new_session=True,
        )


def control(verb: str, unit: str) -> None:
    """Show, start, or stop a unit. The file docker-process has the number of Docker's process."""
    path = FOLDER / unit.removesuffix(".service")
    if verb == "cat":
        sys.exit(not path.exists())
    if verb == "show" and (FOLDER / "docker-process").exists():
        sys.stdout.write((FOLDER / "docker-process").read_text())
    if verb == "start" and not path.with_suffix(".pid").exists():
        start("service", path.name)
    if verb == "stop":
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(path.with_suffix(".pid").read_text()), signal.SIGTERM)
        while path.with_suffix(".pid").exists():
            time.sleep(0.05)


def supervise(unit: str) -> None:
    """Run a service until it succeeds or is stopped."""
    path = FOLDER / unit
    try:
        with path.with_suffix(".pid").open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:  # it runs already
        return
    loaded = json.loads(path.read_text())
    properties = loaded["properties"]
    stopping = False
    service: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if service is not None and service.poll() is None:
            service.terminate()
            signal.alarm(int(properties.get("TimeoutStopSec", 90)))

    def kill(number: int, frame: FrameType | None) -> None:
        if service is not None:
            os.killpg(service.pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, kill)
    while not stopping:
        service = subprocess.Popen(loaded["command"], start_new_session=True)
        code = service.wait()
        with suppress(ProcessLookupError):
            os.killpg(service.pid, signal.SIGKILL)
        if code == 0 or properties.get("Restart") != "on-failure":
            break
        time.sleep(float(properties.get("RestartSec", 0.1)))
    path.unlink()
    path.with_suffix(".pid").unlink()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["systemd-run", *rest]:
            run(rest)
        case ["systemctl", *rest]:
            control(*[argument for argument in rest if not argument.startswith("--")])
        case ["timer", name, seconds]:
            time.sleep(float(seconds))
            supervise(name)
        case ["service", name, *_]:
            supervise(name)
