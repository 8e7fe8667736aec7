"""A full disk is named with its free space, and the run goes on when there is room."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.command import COMMAND

SCRIPT = """
mount -t tmpfs -o size="$SIZE" none "$DISK" || exit 77
"$@" --output "$JOB_OUTPUT"
first=$?
mount -o remount,size=100m "$DISK"
"$@" --output "$JOB_OUTPUT" >/dev/null && echo "$first then $?"
"""


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "size"), [("TMPDIR", "16k"), ("output", "100k")])
def test_a_full_disk_is_named_and_the_run_goes_on(setting: str, size: str, tmp_path: Path) -> None:
    disk, other = tmp_path / "disk", tmp_path / "other"
    disk.mkdir()
    output = disk if setting == "output" else other
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", SCRIPT, "sh", *COMMAND, "run", "smoke", "--until", "data"],
        env=os.environ
        | {"DISK": str(disk), "JOB_OUTPUT": str(output), "SIZE": size}
        | ({"TMPDIR": str(disk)} if setting == "TMPDIR" else {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no disk can be mounted here: {done.stderr}")
    assert done.stdout.splitlines()[-1] == "4 then 0", done.stdout
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: a disk is full")
    assert f"0.0 MB in {disk}" in message
    assert f"({setting})" in message
    assert "Traceback" not in done.stderr + done.stdout
