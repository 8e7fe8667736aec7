"""A fetched run is the one that was left, to the byte; anything else is refused."""

import hashlib
import sys
from pathlib import Path

import pytest

from job import cli
from job.commands.fetch import fetch_run
from job.errors import StageError, UsageError
from job.results import Artifact, Results
from job.storage.base import Store
from job.storage.local import LocalStore
from job.storage.locations import open_store
from tests.report import minimal
from tests.services.bucket import Bucket

FILES = {
    "spec.yaml": b"name: doctor\n",
    "report.html": b"<p>Nothing was measured.</p>",
    "adapter/adapter.lora.h5": bytes(range(256)) * 9,
    "adapter/peft/adapter_config.json": b"{}",
    "evals/baseline/first/predictions.jsonl": b"",
}
EXTRAS = {"logs/job.jsonl": b'{"message": "done"}\n', "stages/train.json": b"{}"}
UNLISTED = {"train/checkpoints/step-9.safetensors": b"large", "notes.txt": b"mine"}


def artifact(path: str, content: bytes) -> Artifact:
    return Artifact(path=path, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def results(*more: Artifact) -> bytes:
    """The results.json of a run that left FILES, and perhaps more."""
    listed = [artifact(path, content) for path, content in FILES.items()]
    whole = Results.model_validate(minimal()).model_copy(update={"artifacts": [*listed, *more]})
    return whole.model_dump_json(indent=2).encode()


def leave_run(store: Store) -> None:
    """What a finished run leaves, results last."""
    for key, content in {**FILES, **EXTRAS, **UNLISTED}.items():
        store.write(key, content)
    store.write("results.json", results())


@pytest.fixture(params=["folder", "bucket"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A finished run, in a folder or in a bucket."""
    if request.param == "folder":
        store = open_store(str(tmp_path / "runs" / "doctor-1"))
    else:
        request.getfixturevalue("bucket")
        store = open_store("gs://runs/team/doctor-1")
    leave_run(store)
    return store


@pytest.fixture
def target(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "fetched")


def test_a_run_comes_whole_with_its_logs_and_markers(run: Store, target: LocalStore) -> None:
    fetch_run(run.uri, target.uri)
    expected = {**FILES, **EXTRAS, "results.json": results()}
    assert {key: target.read(key) for key in target.list()} == expected


def test_files_that_are_there_and_right_are_kept(run: Store, target: LocalStore) -> None:
    fetch_run(run.uri, target.uri)
    before = {key: (target.root / key).stat().st_mtime_ns for key in FILES}
    inodes = {key: (target.root / key).stat().st_ino for key in FILES}
    fetch_run(run.uri, target.uri)
    assert {key: (target.root / key).stat().st_mtime_ns for key in FILES} == before
    assert {key: (target.root / key).stat().st_ino for key in FILES} == inodes


def test_a_file_that_is_there_and_wrong_is_replaced(run: Store, target: LocalStore) -> None:
    fetch_run(run.uri, target.uri)
    changed = bytes(reversed(FILES["adapter/adapter.lora.h5"]))
    target.write("adapter/adapter.lora.h5", changed)
    target.write("report.html", b"cut")
    fetch_run(run.uri, target.uri)
    assert {key: target.read(key) for key in FILES} == FILES


@pytest.mark.parametrize("name", ["my notes.txt", "spec.yaml", ".git/config", "results.json"])
def test_a_folder_of_something_else_is_left_alone(
    name: str, run: Store, target: LocalStore
) -> None:
    target.write(name, b"mine")
    with pytest.raises(UsageError, match="are not of an earlier fetch of"):
        fetch_run(run.uri, target.uri)
    assert {path.name for path in target.root.rglob("*") if path.is_file()} == {Path(name).name}
    assert target.read(name) == b"mine"


def test_a_fetch_that_was_stopped_goes_on(run: Store, target: LocalStore) -> None:
    lost = run.read("adapter/adapter.lora.h5")
    run.delete("adapter/adapter.lora.h5")
    with pytest.raises(StageError, match="missing"):
        fetch_run(run.uri, target.uri)
    assert lost is not None
    run.write("adapter/adapter.lora.h5", lost)
    fetch_run(run.uri, target.uri)
    assert {key: target.read(key) for key in FILES} == FILES
    assert not list(target.root.glob(".partial-*"))


@pytest.mark.parametrize(
    "path", ["conftest.py", ".git/hooks/pre-commit", "adapter/.env", "sitecustomize.py", "reports"]
)
def test_what_a_run_does_not_leave_is_refused(path: str, run: Store, target: LocalStore) -> None:
    run.write(path, b"evil")
    run.write("results.json", results(artifact(path, b"evil")))
    with pytest.raises(StageError, match="which is not a file of a run"):
        fetch_run(run.uri, target.uri)
    assert not target.root.exists()


@pytest.mark.parametrize("key", ["adapter/adapter.lora.h5", "logs/job.jsonl"])
def test_links_are_not_followed_in_the_run_or_in_the_folder(key: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    leave_run(store)
    secret = tmp_path / "secret"
    secret.write_bytes({**FILES, **EXTRAS}[key])
    fetched = LocalStore(tmp_path / "fetched")
    fetch_run(store.uri, fetched.uri)
    for root in (fetched.root, store.root):
        (root / key).unlink()
        (root / key).symlink_to(secret)
        with pytest.raises(StageError, match="symbolic link"):
            fetch_run(store.uri, fetched.uri)
        (root / key).unlink()
        (root / key).write_bytes(secret.read_bytes())


@pytest.mark.parametrize("content", [b"{ }", b"[]", b""], ids=["longer", "changed", "empty"])
def test_a_changed_file_is_refused_and_not_left(
    content: bytes, run: Store, target: LocalStore
) -> None:
    run.write("adapter/peft/adapter_config.json", content)
    with pytest.raises(StageError, match=r"adapter_config\.json does not have the checksum"):
        fetch_run(run.uri, target.uri)
    assert_nothing_wrong(target)


def test_a_missing_file_is_refused(run: Store, target: LocalStore) -> None:
    run.delete("adapter/adapter.lora.h5")
    with pytest.raises(StageError, match=r"the file adapter/adapter\.lora\.h5 is missing"):
        fetch_run(run.uri, target.uri)
    assert_nothing_wrong(target)


@pytest.mark.parametrize("path", ["../evil", "a/../../evil", "/tmp/evil", "a\\..\\evil", ""])
def test_a_path_outside_the_folder_is_refused(
    path: str, run: Store, target: LocalStore, tmp_path: Path
) -> None:
    (tmp_path / "evil").write_bytes(b"kept")
    run.write("results.json", results(artifact(path, b"evil")))
    with pytest.raises(StageError, match="not a relative path inside the folder"):
        fetch_run(run.uri, target.uri)
    assert target.list() == []
    assert (tmp_path / "evil").read_bytes() == b"kept"


def assert_nothing_wrong(target: LocalStore) -> None:
    """Only files that are right, and no results.json that would say that all are there."""
    assert target.read("results.json") is None
    for key in target.list():
        assert target.read(key) == FILES[key]


def test_a_fetch_that_was_refused_goes_on_once_the_run_is_right(
    run: Store, target: LocalStore
) -> None:
    run.delete("adapter/adapter.lora.h5")
    with pytest.raises(StageError):
        fetch_run(run.uri, target.uri)
    run.write("adapter/adapter.lora.h5", FILES["adapter/adapter.lora.h5"])
    fetch_run(run.uri, target.uri)
    assert {key: target.read(key) for key in FILES} == FILES


def test_a_fetch_that_was_cut_off_is_completed_by_the_next(
    target: LocalStore, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 8000
    monkeypatch.setenv("JOB_RETRY_SECONDS", "0.1")
    store = open_store("gs://runs/r")
    leave_run(store)
    store.write("adapter/big.bin", content)
    store.write("results.json", results(artifact("adapter/big.bin", content)))
    bucket.faults.add("big.bin?alt=media", cut_after=1_500_000)
    bucket.faults.add("big.bin?alt=media", status=503, times=99)
    with pytest.raises(StageError, match=r"big\.bin.*run the same command to resume"):
        fetch_run(store.uri, target.uri)
    assert target.read("adapter/big.bin") is None
    bucket.faults.clear()
    fetch_run(store.uri, target.uri)
    assert target.read("adapter/big.bin") == content
    assert not [path for path in target.root.rglob("*") if "partial" in path.name]


def test_a_run_without_results_is_not_finished(run: Store, target: LocalStore) -> None:
    run.delete("results.json")
    with pytest.raises(UsageError, match=r"has no results\.json: it is not a run, or not finished"):
        fetch_run(run.uri, target.uri)
    assert not target.root.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"not JSON", b'{"schema_version": 2}'])
def test_results_of_another_kind_are_refused(
    content: bytes, run: Store, target: LocalStore
) -> None:
    run.write("results.json", content)
    with pytest.raises(StageError, match="cannot be read by this version"):
        fetch_run(run.uri, target.uri)
    assert not target.root.exists()


def test_the_command_reports_the_folder_and_exits(
    run: Store,
    target: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fetch() -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["job", "fetch", run.uri, target.uri])
        return cli.main(), *capsys.readouterr()

    code, out, err = fetch()
    assert (code, err) == (0, "")
    assert "checksums verified" in out
    assert target.uri in out
    run.write("report.html", b"changed")
    (target.root / "report.html").unlink()
    code, _, err = fetch()
    assert code == 4
    assert err == (
        f"error: {run.uri}: the file report.html does not have the checksum in results.json\n"
    )
