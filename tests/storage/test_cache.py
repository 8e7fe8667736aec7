"""A folder of the cache is complete or absent, whoever builds it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.errors import SetupError
from job.storage.locations import build_once


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
