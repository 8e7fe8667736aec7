"""The other side of parity tests, in a virtual environment of its own: PyTorch, transformers, PEFT
and lm-evaluation-harness.

The environment is created on first use, cached in the user's cache folder under a key of its
requirements, and shared by all tests. Nothing is imported from it: the scripts of this folder run
there and exchange files. pip picks the build of torch; an index with a CPU-only build
(PIP_EXTRA_INDEX_URL) saves gigabytes.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent
REQUIREMENTS = (
    "torch==2.13.0",
    "transformers==5.24.0",
    "peft==0.21.2",
    "safetensors==0.8.0",
    "accelerate==1.15.0",
    "sentencepiece>=0.2.1,<0.3",
    "tiktoken>=0.9,<1",
    "lm_eval==0.4.13",
    "trl==1.16.0",
    "protobuf>=6,<8",
    "numpy>=2.1,<3",
)
PYTHON = "3.11"
"""Used if it is on the machine, else the tests' own."""

_BUILD_SECONDS = 900
_SCRIPT_SECONDS = 300


def run_peer(script: str, *arguments: object, seconds: float = _SCRIPT_SECONDS) -> None:
    """Run a script of this folder in the environment, for some seconds at most.

    Raises:
        AssertionError: it failed; the message ends with its standard error.
    """
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/tmp"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin starve what runs beside them
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [_python(), SCRIPTS / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, f"{script} failed:\n{done.stderr[-4000:]}"


def _python() -> Path:
    """Return the environment's interpreter, creating the environment if it does not exist."""
    base = _base()
    key = hashlib.sha256("\n".join([base, *REQUIREMENTS]).encode()).hexdigest()[:12]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "job-peers" / key
    ready = folder / "ready"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _call("uv", "venv", "--quiet", "--seed", "--python", base, str(folder))
            _call(str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *REQUIREMENTS)
            ready.touch()
    return folder / "bin/python"


def _base() -> str:
    interpreter = subprocess.run(
        ["uv", "python", "find", "--no-project", "--no-python-downloads", PYTHON],
        capture_output=True,
        text=True,
        check=False,
    )
    return interpreter.stdout.strip() if interpreter.returncode == 0 else sys.executable


def _call(*command: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False
    )
    assert done.returncode == 0, f"{command[:4]} failed:\n{done.stderr[-4000:]}"
