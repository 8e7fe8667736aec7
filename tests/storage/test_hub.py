"""Files of the Hub arrive complete and correct; every refusal names the way out."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.hf_api import RepoFile

from job.errors import JobError, SetupError, StageError, UsageError
from job.model.load import resolve_preset
from job.spec.schema import Model
from job.storage.hub import Repository
from job.storage.locations import open_store
from job.storage.retry import retry_after
from tests.services.endless import endless_server
from tests.services.hub import Hub

BIG = os.urandom(700_000)
FILES = {"config.json": b"{}", "part/model.safetensors": BIG, "old.bin": b"x" * 9}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("JOB_RETRY_SECONDS", "3")
    monkeypatch.setenv("JOB_STALL_SECONDS", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("job.storage.retry._FIRST_WAIT_SECONDS", 0.02)
    with Hub(large=100_000, page_size=2) as service:
        monkeypatch.setenv("HF_ENDPOINT", service.url)
        yield service


def fetch(repository: Repository, folder: Path) -> dict[str, bytes]:
    commit = repository.commit()
    files = repository.files(commit)
    repository.fetch(commit, files, folder)
    return {file.path: (folder / file.path).read_bytes() for file in files}


def test_small_and_large_files_of_a_commit_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    first = hub.add_repo("models", "org/m", FILES)
    second = hub.add_repo("models", "org/m", {**FILES, "config.json": b"[]"})
    assert fetch(Repository("model", "org/m"), tmp_path / "a") == {**FILES, "config.json": b"[]"}
    assert fetch(Repository("model", "org/m", first), tmp_path / "b") == FILES
    assert Repository("model", "org/m").commit() == second
    listed = {file.path: file for file in Repository("model", "org/m").files(second)}
    assert listed["part/model.safetensors"].lfs is not None
    assert listed["config.json"].lfs is None
    before = len(hub.requested("/resolve/"))
    fetch(Repository("model", "org/m"), tmp_path / "a")
    assert len(hub.requested("/resolve/")) == before


def test_the_token_is_sent_to_no_other_host(
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
        ("org/none", None, None, UsageError,
         "is private: check the name, ask for access at https://.*/none, or set HF_TOKEN"),
        ("org/none", None, "hf_other", UsageError, "a token is set"),
        ("org/private", None, None, UsageError, "or it is private"),
        ("org/m", "v9", None, UsageError, "has no revision 'v9'; see https://"),
        ("org/gated", None, None, SetupError,
         "is gated: accept its terms at https://huggingface.co/org/gated and set HF_TOKEN"),
        ("org/gated", None, "hf_other", SetupError, "of the account that did"),
    ],
)  # fmt: skip
def test_a_refusal_is_not_retried_and_names_the_way_out(
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
    assert len(routes) == len(set(routes)) or name == "org/gated"  # nothing was retried


def test_a_cut_download_resumes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.add_repo("models", "org/m", FILES)
    hub.cdn.faults.add("GET /", cut_after=400_000)
    hub.cdn.faults.add("GET /", status=503, times=3)
    assert fetch(Repository("model", "org/m"), tmp_path) == FILES
    ranges = [request.headers["Range"] for request in hub.cdn.requests]
    assert ranges == [None, *["bytes=400000-"] * 4]


@pytest.mark.parametrize("folder", [True, False])
def test_remains_of_a_killed_download_are_not_used(folder: bool, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("models", "org/m", FILES)
    remains = tmp_path / "part/.partial-model.safetensors"
    if folder:
        remains.mkdir(parents=True)
        (remains / "model.safetensors").write_bytes(bytes(len(BIG)))
    else:
        remains.parent.mkdir()
        remains.write_bytes(bytes(500_000))
    (tmp_path / "config.json").write_bytes(b"[]")
    assert fetch(Repository("model", "org/m"), tmp_path) == FILES
    assert {path.name for path in tmp_path.rglob("*")} == {
        "config.json", "part", "model.safetensors", "old.bin"
    }  # fmt: skip


def test_two_processes_download_a_file_once(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("models", "org/m", FILES)
    hub.cdn.faults.add("GET /", spoil="slow")
    code = (
        "import sys\nfrom pathlib import Path\nfrom job.storage.hub import Repository\n"
        "repository = Repository('model', 'org/m')\ncommit = repository.commit()\n"
        "repository.fetch(commit, repository.files(commit), Path(sys.argv[1]))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(60) for process in started] == [0, 0]
    assert len(hub.cdn.requests) == 1
    assert (tmp_path / "part/model.safetensors").read_bytes() == BIG


def test_offline_mode_is_refused_with_the_way_out(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SetupError, match="unset HF_HUB_OFFLINE"):
        Repository("model", "org/m").commit()


@pytest.mark.parametrize("endpoint", ["hub.example", "ftp://hub.example"])
def test_a_wrong_endpoint_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(SetupError, match="HF_ENDPOINT=.* is not the address of a Hub"):
        Repository("model", "org/m").commit()


def test_credentials_of_netrc_are_not_sent(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    hub.add_repo("models", "org/m", FILES)
    fetch(Repository("model", "org/m"), tmp_path)
    sent = [*hub.requests, *hub.cdn.requests]
    assert len(sent) > 5
    assert {request.headers["Authorization"] for request in sent} == {None}


def test_a_file_that_is_always_wrong_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("models", "org/m", FILES)
    hub.cdn.faults.add("GET /", spoil="flip", times=99)
    with pytest.raises(StageError, match="did not have the expected checksum"):
        fetch(Repository("model", "org/m"), tmp_path)
    assert not (tmp_path / "part/model.safetensors").exists()


def test_retries_are_limited_and_respect_retry_after(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("models", "org/m", FILES)
    hub.faults.add("GET /api", status=429, headers={"Retry-After": "1"})
    clock = time.monotonic()
    Repository("model", "org/m").commit()
    assert time.monotonic() - clock >= 1
    hub.faults.add("GET /api", status=503, headers={"Retry-After": "500"})
    with pytest.raises(StageError, match=r"503 .*requests 500 s\); run the same command"):
        Repository("model", "org/m").commit()
    hub.faults.add("GET /api", status=503, times=10_000)
    with pytest.raises(StageError, match=r"gave up after \d+ attempts in \d+ s"):
        Repository("model", "org/m").commit()


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("7") == 7
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after(None) is retry_after("soon") is None


def test_a_listing_cannot_write_outside_the_folder(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("models", "org/m", FILES)
    for path in ("../evil", "/tmp/evil", "a/../../evil", "", "a//b", "a\\..\\b", "a\0", "a\nb"):
        with pytest.raises(StageError, match="which is (outside|not a name)"):
            file = RepoFile(path=path, size=1, oid="0")
            Repository("model", "org/m").fetch("c" * 40, [file], tmp_path)


@pytest.mark.parametrize(("path", "error"), [("gzip", "more than 64 MB"), ("drip", "after 1 s")])
def test_a_reply_without_an_end_is_given_up(
    path: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_RETRY_SECONDS", "0.1")
    monkeypatch.setenv("JOB_STALL_SECONDS", "0.25" if path == "drip" else "30")
    with endless_server() as url:
        monkeypatch.setenv("HF_ENDPOINT", f"{url}/{path}")
        with pytest.raises(StageError, match=error):
            Repository("model", "org/m").commit()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        with pytest.raises(StageError, match=error):
            open_store("gs://runs").stat(path)


def test_files_that_the_commit_does_not_list_are_deleted(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_CACHE", str(tmp_path))
    hub.add_repo("models", "org/m", FILES)
    model = Model(preset="hf://org/m")
    folder = Path(resolve_preset(model, {}).handle)
    (folder / "assets").mkdir()
    (folder / "assets/tokenizer.json").write_text("{}")
    partial = folder / ".partial-config.json/x"
    partial.parent.mkdir()
    partial.write_text("of another process")
    resolve_preset(model, {})
    assert not (folder / "assets/tokenizer.json").exists()
    assert partial.exists()


def test_only_files_that_kerashub_reads_are_downloaded(
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
