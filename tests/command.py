"""The real command in a process of its own, as a user starts it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

COMMAND = (sys.executable, "-m", "job")
LIMIT_SECONDS = 400


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """Its log lines."""
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]

    def stages(self, message: str) -> list[str]:
        """The stages with a log line that begins so, in order."""
        return [e["stage"] for e in self.events if e["message"].startswith(message)]


def job(*arguments: str, environment: Mapping[str, str] | None = None) -> Done:
    """Run `job` with these arguments to its end."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    return Done(done.returncode, done.stdout, done.stderr)


def job_stopped(
    *arguments: str,
    when: Callable[[dict[str, Any]], bool],
    number: signal.Signals,
    environment: Mapping[str, str] | None = None,
) -> Done:
    """Run `job`, and send it a signal at the first log line for which `when` holds."""
    lines = []
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for line in process.stdout:
                lines.append(line)
                if line.startswith("{") and when(json.loads(line)):
                    process.send_signal(number)
                    break
            rest, err = process.communicate(timeout=LIMIT_SECONDS)
        except BaseException:
            process.kill()
            raise
    return Done(process.returncode, "".join(lines) + rest, err)
