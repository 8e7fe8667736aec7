"""Kills a stage that asks a remote model, while its requests wait for answers."""

import os
import subprocess
import sys
import time
from pathlib import Path

from job.evals.api_client import API_KEY_VARIABLE
from job.pipeline import layout
from job.storage.local import LocalStore
from tests.services.openrouter import OpenRouter


def kill_while_it_waits(
    stage: str, store: LocalStore, service: OpenRouter, answers: int, key: str
) -> str:
    """Start a stage in a process, kill it after some answers, return its output and arguments.

    `tests.pipeline.STAGE_runs RUN_URI BASE_URL` runs the stage; `key` is the service's.
    """
    service.faults.add("POST", spoil="stall", skip=answers, times=99)
    before = len(service.requests)
    with subprocess.Popen(
        [sys.executable, "-m", f"tests.pipeline.{stage}_runs", store.uri, f"{service.url}/api/v1"],
        env={**os.environ, API_KEY_VARIABLE: key},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        until = time.monotonic() + 60
        while saved_replies(stage, store) < answers or len(service.requests) < before + answers + 2:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.05)
        arguments = Path(f"/proc/{process.pid}/cmdline").read_text()
        process.kill()
        output, _ = process.communicate(timeout=20)
    service.faults.clear()
    return output + arguments


def saved_replies(stage: str, store: LocalStore) -> int:
    """Count the replies in the stage's partial files."""
    _, partial = layout.replies(stage)
    return sum((store.read(key) or b"").count(b"\n") for key in store.list(partial))
