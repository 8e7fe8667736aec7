"""A folder of the cache is complete or absent, whoever builds it."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.errors import SetupError
from job.storage.locations import build_once, ensure_home


def test_a_folder_that_failed_to_build_is_not_there(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        build_once(tmp_path / "presets" / "mine", build)
    assert list((tmp_path / "presets").iterdir()) == []


def test_builders_at_the_same_time_end_with_one_folder(tmp_path: Path) -> None:
    together = threading.Barrier(3)

    def build(folder: Path) -> None:
        (folder / "whole").write_text("whole")
        together.wait()  # all have found no folder, and none has finished

    with ThreadPoolExecutor(3) as threads:
        built = [threads.submit(build_once, tmp_path / "mine", build) for _ in range(3)]
        assert {future.result() for future in built} == {tmp_path / "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "whole").read_text() == "whole"
    assert build_once(tmp_path / "mine", build) == tmp_path / "mine"


def test_a_cache_that_cannot_be_written_is_a_setup_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot write to the cache .*; set JOB_CACHE"):
        build_once(tmp_path / "file" / "mine", lambda folder: None)


NO_HOME = """
import os, pwd, sys

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown
del os.environ["HOME"]
sys.argv = ["job", "run", "smoke", "--until", "data", "--output", sys.argv[1]]
from job.__main__ import main
main()
"""


def test_a_user_without_a_home_gets_a_private_one(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("JOB_CACHE", "XDG_CACHE_HOME")}
    run = subprocess.run(
        [sys.executable, "-c", NO_HOME, str(tmp_path / "runs")],
        env=environment | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    home = tmp_path / f"job-{os.getuid()}"
    assert home.stat().st_mode & 0o777 == 0o700


def unknown() -> Path:
    raise RuntimeError


def test_a_home_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(Path, "home", unknown)
    (tmp_path / f"job-{os.getuid()}").symlink_to("/nowhere")
    with pytest.raises(SetupError, match="set HOME"):
        ensure_home()
