"""The bucket store against a third-party emulator, as far as that goes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from job.storage.base import Store
from job.storage.locations import open_store
from tests.storage import size_of


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1",
         f"--port={port}", "--in-memory", "--default-bucket=runs"],
        cwd=tmp_path_factory.mktemp("emulator"), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            if process.poll() is not None:
                assert process.stderr is not None
                pytest.fail(process.stderr.read())
            try:
                requests.get(url, timeout=1)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def store(emulator: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    monkeypatch.setenv("JOB_RETRY_SECONDS", "5")
    return open_store("gs://runs/team/run")


def test_small_and_large_files_are_written_read_and_listed(store: Store, tmp_path: Path) -> None:
    content = os.urandom(9 * 1024 * 1024)
    (tmp_path / "big").write_bytes(content)
    store.upload(tmp_path / "big", "deep/big")
    assert store.download("deep/big", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert size_of(store, "deep/big") == len(content)
    assert store.list() == ["deep/big"]
    store.delete("deep/big")
    assert size_of(store, "deep/big") is None


def test_a_file_is_written_read_and_replaced(store: Store) -> None:
    assert store.read("a/b.json") is None
    store.write("a/b.json", b"first")
    assert store.read("a/b.json") == b"first"
    store.write("a/b.json", b"second")
    assert (store.read("a/b.json"), size_of(store, "a/b.json")) == (b"second", 6)
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert store.list("a/") == ["a/b.json"]
