"""The Hub is read whole and right, with the way out of every refusal."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.errors import JobError, SetupError, StageError, UsageError
from job.model.load import resolve_preset
from job.spec.schema import Model
from job.storage import hub as hub_module
from job.storage.hub import HubFile, Repository
from job.storage.retry import retry_after
from tests.services.hub import Hub

BIG = os.urandom(700_000)
FILES = {"config.json": b"{}", "part/model.safetensors": BIG, "old.bin": b"x" * 9}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("JOB_RETRY_SECONDS", "3")
    monkeypatch.setenv("JOB_STALL_SECONDS", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("job.storage.retry._FIRST_SECONDS", 0.02)
    hub_module.client.cache_clear()
    with Hub(large=100_000, page_size=2) as service:
        monkeypatch.setenv("HF_ENDPOINT", service.url)
        yield service
    hub_module.client.cache_clear()


def fetch(repository: Repository, folder: Path) -> dict[str, bytes]:
    commit = repository.commit()
    files = repository.files(commit)
    repository.fetch(commit, files, folder)
    return {file.path: (folder / file.path).read_bytes() for file in files}


def test_files_come_with_their_checksums_from_wherever_they_are(hub: Hub, tmp_path: Path) -> None:
    first = hub.add_repo("models", "org/m", FILES)
    second = hub.add_repo("models", "org/m", {**FILES, "config.json": b"[]"})
    assert fetch(Repository("model", "org/m"), tmp_path / "a") == {**FILES, "config.json": b"[]"}
    assert fetch(Repository("model", "org/m", first), tmp_path / "b") == FILES
    assert Repository("model", "org/m").commit() == second
    listed = {file.path: file for file in Repository("model", "org/m").files(second)}
    assert listed["part/model.safetensors"].sha256 is not None
    assert listed["config.json"].sha256 is None
    before = len(hub.requested("/resolve/"))
    fetch(Repository("model", "org/m"), tmp_path / "a")
    assert len(hub.requested("/resolve/")) == before


def test_the_token_opens_what_is_private_and_goes_to_no_other_host(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("datasets", "org/d", FILES, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert fetch(Repository("dataset", "org/d"), tmp_path) == FILES
    assert all(request.bearer == hub.token for request in hub.requests)
    assert [request.bearer for request in hub.cdn.requests] == [None]


@pytest.mark.parametrize(
    ("name", "revision", "token", "kind", "words"),
    [
        ("org/none", None, None, UsageError, "or it is private: check the name, or set HF_TOKEN"),
        ("org/none", None, "hf_other", UsageError, "HF_TOKEN is set"),
        ("org/private", None, None, UsageError, "or it is private"),
        ("org/m", "v9", None, UsageError, "has no revision 'v9'; see https://"),
        ("org/gated", None, None, SetupError,
         "is gated: accept its terms at https://huggingface.co/org/gated and set HF_TOKEN"),
        ("org/gated", None, "hf_other", SetupError, "of the account that did"),
    ],
)  # fmt: skip
def test_a_refusal_comes_at_once_and_names_the_way_out(
    name: str, revision: str | None, token: str | None, kind: type[JobError], words: str,
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hub.add_repo("models", "org/m", FILES)
    hub.add_repo("models", "org/gated", FILES, gated=True)
    hub.add_repo("models", "org/private", FILES, private=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(kind, match=words) as refused:
        fetch(Repository("model", name, revision), tmp_path)
    assert token is None or token not in str(refused.value)
    routes = [request.path for request in hub.requests]
    assert len(routes) == len(set(routes)) or name == "org/gated"  # nothing was tried again


def test_a_download_goes_on_where_an_earlier_process_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("models", "org/m", FILES)
    repository = Repository("model", "org/m")
    (tmp_path / "part").mkdir()
    (tmp_path / "part/.partial-model.safetensors").write_bytes(BIG[:500_000])
    assert fetch(repository, tmp_path) == FILES
    (request,) = hub.cdn.requests
    assert request.headers["Range"] == "bytes=500000-"


def test_what_an_earlier_process_left_is_not_trusted(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("models", "org/m", FILES)
    (tmp_path / "part").mkdir()
    (tmp_path / "part/.partial-model.safetensors").write_bytes(bytes(500_000))
    (tmp_path / "config.json").write_bytes(b"[]")
    assert fetch(Repository("model", "org/m"), tmp_path) == FILES


def test_a_file_that_is_wrong_every_time_is_refused_and_not_left(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("models", "org/m", FILES)
    hub.cdn.faults.add("GET /", spoil="flip", times=99)
    with pytest.raises(StageError, match="did not have the checksum"):
        fetch(Repository("model", "org/m"), tmp_path)
    assert not (tmp_path / "part/model.safetensors").exists()


def test_time_is_bounded_and_the_wait_a_server_asks_for_is_kept(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("models", "org/m", FILES)
    hub.faults.add("GET /api", status=429, headers={"Retry-After": "1"})
    clock = time.monotonic()
    Repository("model", "org/m").commit()
    assert 1 <= time.monotonic() - clock < 3
    hub.faults.add("GET /api", status=503, headers={"Retry-After": "500"})
    with pytest.raises(StageError, match="503 .*asked to wait 500 s; run the same command"):
        Repository("model", "org/m").commit()
    hub.faults.add("GET /api", status=503, times=10_000)
    clock = time.monotonic()
    with pytest.raises(StageError, match=r"given up after \d+ tries in [1-3] s"):
        Repository("model", "org/m").commit()
    assert time.monotonic() - clock < 5


def test_waits_are_read_in_seconds_and_as_a_date() -> None:
    assert retry_after("7") == 7
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after(None) is retry_after("soon") is None


def test_a_listing_cannot_write_outside_the_folder(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("models", "org/m", FILES)
    for path in ("../evil", "/tmp/evil", "a/../../evil"):
        with pytest.raises(StageError, match="no path inside it"):
            Repository("model", "org/m").fetch("c" * 40, [HubFile(path, 1, None, "0")], tmp_path)


def test_a_model_comes_into_the_cache_without_what_kerashub_does_not_read(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_CACHE", str(tmp_path))
    commit = hub.add_repo("models", "org/m", FILES)
    preset = resolve_preset(Model(preset="hf://org/m"), {})
    folder = Path(preset.handle)
    assert preset.revision == commit
    assert folder == tmp_path / "models/org--m" / commit
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.json", "model.safetensors"}
