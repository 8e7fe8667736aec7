"""A folder and a bucket behave the same: a write is complete or absent."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from google.auth.credentials import AnonymousCredentials
from hypothesis import given
from hypothesis import strategies as st

from job.errors import SetupError, StageError, UsageError
from job.runtime.watchdog import WATCHDOG
from job.storage.base import Store, check_key, file_sha256
from job.storage.gcs import GcsStore, client
from job.storage.local import LocalStore
from job.storage.locations import child_uri, open_store, read_uri
from tests.command import job
from tests.services.bucket import Bucket
from tests.storage import size_of

Call = Callable[[Store, str, Path], object]

CALLS: dict[str, Call] = {
    "read": lambda store, key, path: store.read(key),
    "write": lambda store, key, path: store.write(key, b"new"),
    "size": lambda store, key, path: size_of(store, key),
    "delete": lambda store, key, path: store.delete(key),
    "download": lambda store, key, path: store.download(key, path.with_name("copy")),
    "upload": lambda store, key, path: store.upload(path, key),
}
OBJECTS = "/b/runs/o"
"""Part of the paths of all requests for objects."""
OUTSIDE = ["", ".", "..", "../up", "a/../../up", "/etc/hosts", "a\\..\\b", "a\0b"]


@pytest.fixture
def remote(bucket: Bucket) -> Store:
    return open_store("gs://runs/team/doctor-1")


@pytest.fixture(params=["folder", "bucket", "bucket root"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "runs" / "doctor-1"))
    request.getfixturevalue("bucket")
    return open_store("gs://runs/team/doctor-1" if request.param == "bucket" else "gs://runs")


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"from a file")
    return path


def test_a_file_is_written_read_and_replaced(store: Store) -> None:
    content = bytes(range(256)) * 50
    store.write("a/b.bin", content)
    store.write("empty", b"")
    assert (store.read("a/b.bin"), size_of(store, "a/b.bin")) == (content, len(content))
    assert (store.read("empty"), size_of(store, "empty")) == (b"", 0)
    store.write("a/b.bin", b"shorter")
    assert (store.read("a/b.bin"), size_of(store, "a/b.bin")) == (b"shorter", 7)


def test_files_are_listed_by_prefix_in_order(store: Store) -> None:
    for key in ("stages/train.json", "data/x", "data/ä b.json", "stages/data.json", "database"):
        store.write(key, b"")
    assert store.list("stages/") == ["stages/data.json", "stages/train.json"]
    assert store.list("data") == ["data/x", "data/ä b.json", "database"]
    assert store.list("none/") == []
    assert len(store.list()) == 5


def test_files_are_uploaded_and_downloaded(store: Store, file: Path, tmp_path: Path) -> None:
    store.upload(file, "deep/down/file")
    assert store.read("deep/down/file") == b"from a file"
    file.write_bytes(b"changed")
    store.upload(file, "deep/down/file")
    target = tmp_path / "new" / "folder" / "file"
    assert store.download("deep/down/file", target)
    assert target.read_bytes() == b"changed"
    assert file_sha256(target) == file_sha256(file)


def test_a_missing_file_is_none_and_can_be_deleted(store: Store, tmp_path: Path) -> None:
    assert store.list() == []
    assert store.read("a/none") is None
    assert size_of(store, "a/none") is None
    assert not store.download("a/none", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    store.delete("a/none")
    store.write("a/some", b"1")
    store.delete("a/some")
    store.delete("a/some")
    assert store.read("a/some") is None
    assert store.list() == []


def test_a_folder_is_not_a_file(store: Store) -> None:
    store.write("a/b", b"1")
    assert size_of(store, "a") is None
    assert store.read("a/b/c") is None
    assert size_of(store, "a/b/c") is None


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_key_that_leaves_the_folder_is_refused(call: Call, store: Store, file: Path) -> None:
    for key in OUTSIDE:
        with pytest.raises(StageError, match="not a relative path inside the folder"):
            call(store, key, file)


@given(
    st.lists(st.sampled_from(["a", ".", "..", "/", "//", "\\", "b c", "~", "%2e%2e"]), max_size=6)
)
def test_an_accepted_key_stays_inside_the_folder(parts: list[str]) -> None:
    try:
        key = check_key("/".join(parts))
    except StageError:
        return
    assert os.path.normpath(f"/runs/one/{key}").startswith("/runs/one/")


def test_a_failed_local_write_leaves_nothing(local: LocalStore, file: Path) -> None:
    local.write("blocked", b"a file where a folder is needed")
    with pytest.raises(StageError, match=r"cannot write .*blocked/a"):
        local.write("blocked/a", b"1")
    with pytest.raises(StageError, match=r"cannot write .*blocked/a"):
        local.upload(file, "blocked/a")
    assert [path.name for path in local.root.rglob("*")] == ["blocked"]
    with pytest.raises(StageError, match="cannot write"):
        LocalStore(local.root / "blocked").write("a", b"1")
    assert local.read("blocked") == b"a file where a folder is needed"


def test_a_failed_local_write_preserves_the_old_file(local: LocalStore, tmp_path: Path) -> None:
    local.write("old", b"old")
    local.write("folder/in", b"1")
    with pytest.raises(StageError, match=r"cannot write .*old"):
        local.upload(tmp_path / "no such file", "old")
    with pytest.raises(StageError, match=r"cannot write .*folder"):
        local.write("folder", b"2")
    assert local.read("old") == b"old"
    assert sorted(path.name for path in local.root.rglob("*")) == ["folder", "in", "old"]


def test_unfinished_files_are_not_listed(
    local: LocalStore,
) -> None:
    local.write("data/complete", b"1")
    (local.root / "data/.partial-x1").write_bytes(b"half")
    (local.root / "data/.partial-x2").mkdir()
    (local.root / "data/.partial-x2/x2").write_bytes(b"half")
    assert local.list() == ["data/complete"]


def test_a_local_file_can_be_read_by_others(local: LocalStore) -> None:
    local.write("report.html", b"1")
    assert (local.root / "report.html").stat().st_mode & 0o777 == 0o644


def test_a_relative_folder_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.write("a", b"1")
    assert store.uri == str(tmp_path / "runs")
    assert (tmp_path / "runs" / "a").read_bytes() == b"1"


def test_only_objects_under_the_prefix_are_visible(bucket: Bucket, remote: Store) -> None:
    bucket.put("runs", "team/doctor-10/a", b"another run")
    bucket.put("runs", "a", b"no run")
    remote.write("a", b"mine")
    assert remote.list() == ["a"]
    remote.delete("a")
    assert bucket.names("runs") == ["a", "team/doctor-10/a"]


def test_transfers_of_a_large_object_resume(bucket: Bucket, remote: Store, tmp_path: Path) -> None:
    content = os.urandom(9 * 1024 * 1024)
    (tmp_path / "big").write_bytes(content)
    bucket.faults.add("PUT /upload", cut_after=0)
    remote.upload(tmp_path / "big", "big")
    assert len(bucket.requested("POST /upload")) == 1
    bucket.faults.add("alt=media", cut_after=5_000_000)
    assert remote.download("big", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert bucket.faults.pending == []


def test_a_burst_of_503_is_survived_by_every_call(
    bucket: Bucket, remote: Store, file: Path
) -> None:
    bucket.faults.add(OBJECTS, status=503, times=2)
    remote.write("a", b"1")
    for call in ("upload", "read", "size", "delete"):
        bucket.faults.add(OBJECTS, status=503)
        CALLS[call](remote, "a", file)
    bucket.faults.add(OBJECTS, status=503)
    assert remote.list() == []
    assert bucket.faults.pending == []
    assert bucket.names("runs") == []


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_403_names_the_object_and_the_missing_role(
    call: Call, bucket: Bucket, remote: Store, file: Path
) -> None:
    bucket.faults.add(OBJECTS, status=403, times=9)
    with pytest.raises(SetupError, match=r"roles/storage\.objectUser") as refused:
        call(remote, "a.json", file)
    assert "gs://runs/team/doctor-1/a.json" in str(refused.value)
    assert refused.value.exit_code == 3
    assert len(bucket.requested(OBJECTS)) == 1


def test_a_403_on_a_listing_names_the_missing_role(bucket: Bucket, remote: Store) -> None:
    bucket.faults.add(OBJECTS, status=403, times=9)
    with pytest.raises(SetupError, match=r"not allowed to list .*storage\.objectUser"):
        remote.list()


REFUSALS = {
    "perimeter": (
        403,
        b"Request is prohibited by organization's policy. vpcServiceControlsUniqueIdentifier: 3eb0",
        "run inside of it",
    ),
    "requester": (
        400,
        b"Bucket is a requester pays bucket but no user project provided.",
        "set JOB_USER_PROJECT",
    ),
    "project": (
        403,
        b"job@p.iam.gserviceaccount.com does not have serviceusage.services.use access to the "
        b"Google Cloud project.",
        "serviceUsageConsumer",
    ),
    "billing": (
        403,
        b"The billing account for the owning project is disabled in state absent",
        "billing is disabled",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_names_its_own_way_out(
    refusal: tuple[int, bytes, str], bucket: Bucket, remote: Store
) -> None:
    status, body, way_out = refusal
    bucket.faults.add(OBJECTS, status=status, body=body)
    with pytest.raises(SetupError, match=way_out) as refused:
        remote.read("a")
    assert "objectUser" not in str(refused.value)


@pytest.mark.parametrize(
    ("why", "way_out"),
    [
        (
            "is subject to bucket's retention policy or object retention and cannot be deleted "
            "or overwritten until 2027-01-01T00:00:00Z",
            "has a retention policy",
        ),
        (
            "is under active Event-Based hold and cannot be deleted, overwritten or archived "
            "until hold is removed.",
            "release the hold",
        ),
    ],
)
def test_a_run_in_a_bucket_that_keeps_all_files_is_refused(
    why: str, way_out: str, bucket: Bucket
) -> None:
    bucket.protect(why)
    done = job("run", "smoke", "--until", "data", "--run-id", "r", "--output", "gs://runs")
    assert done.code == 3, done.err
    assert way_out in done.err
    assert all(name.startswith("r/.probe") for name in bucket.names("runs"))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_missing_bucket_is_not_a_missing_file(call: Call, bucket: Bucket, file: Path) -> None:
    with pytest.raises(SetupError, match="there is no bucket gs://none; create it"):
        call(open_store("gs://none/runs"), "a", file)
    with pytest.raises(SetupError, match="there is no bucket gs://none"):
        open_store("gs://none/runs").list()


def test_a_permanent_refusal_is_a_stage_error(bucket: Bucket, remote: Store) -> None:
    bucket.faults.add(OBJECTS, status=400)
    with pytest.raises(StageError, match="cannot write gs://runs/team/doctor-1/a"):
        remote.write("a", b"1")


def test_one_object_is_read_by_its_uri(bucket: Bucket) -> None:
    bucket.put("runs", "specs/doctor.yaml", b"name: doctor")
    bucket.put("runs", "top.yaml", b"name: top")
    assert read_uri("gs://runs/specs/doctor.yaml") == b"name: doctor"
    assert read_uri("gs://runs/top.yaml") == b"name: top"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://runs/none.yaml", "there is no object gs://runs/none.yaml"),
        ("gs://runs", "names no object"),
        ("gs://runs/", "names no object"),
        ("gs://", "names no object"),
        ("gs:///a", "needs a bucket"),
        ("s3://runs/a", "neither a local folder nor gs://"),
        ("", "names no object"),
    ],
)
def test_a_uri_of_nothing_is_a_usage_error(uri: str, message: str, bucket: Bucket) -> None:
    with pytest.raises(UsageError, match=message):
        read_uri(uri)


@pytest.mark.parametrize(
    "uri", ["s3://b/runs", "file:///runs", "http://host/runs", "gs://", "gs:///r"]
)
def test_a_store_of_another_kind_is_refused(uri: str) -> None:
    with pytest.raises(UsageError):
        open_store(uri)


@pytest.mark.parametrize(
    ("uri", "kind", "shown"),
    [
        ("gs://runs", GcsStore, "gs://runs"),
        ("gs://runs/", GcsStore, "gs://runs"),
        ("gs://runs/a/b/", GcsStore, "gs://runs/a/b"),
        ("/data/runs/", LocalStore, "/data/runs"),
    ],
)
def test_a_store_has_a_uri(uri: str, kind: type, shown: str) -> None:
    store = open_store(uri)
    assert (type(store), store.uri) == (kind, shown)


@pytest.mark.parametrize(
    ("uri", "child"),
    [
        ("gs://runs", "gs://runs/one"),
        ("gs://runs/a/", "gs://runs/a/one"),
        ("runs", "runs/one"),
        ("./runs/", "runs/one"),
        ("/", "/one"),
    ],
)
def test_child_uri_is_inside(uri: str, child: str) -> None:
    assert child_uri(uri, "one") == child


@pytest.mark.parametrize(
    ("status", "headers"),
    [(404, {}), (410, {}), (308, {}), (308, {"Range": "bytes=0-262143"})],
    ids=["not found", "gone", "stored nothing", "stored a part"],
)
def test_an_upload_whose_session_is_lost_restarts(
    status: int, headers: dict[str, str], bucket: Bucket, remote: Store, tmp_path: Path
) -> None:
    content = os.urandom(9 * 1024 * 1024)
    (tmp_path / "big").write_bytes(content)
    bucket.faults.add("PUT /upload", status=status, headers=headers)
    remote.upload(tmp_path / "big", "big")
    assert remote.read("big") == content
    assert len(bucket.requested("POST /upload")) == 2


def test_every_request_names_the_paying_project(
    bucket: Bucket, remote: Store, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_USER_PROJECT", "payer")
    for call in CALLS.values():
        call(remote, "a", file)
    remote.list()
    assert {request.query.get("userProject") for request in bucket.requests} == {"payer"}


def test_the_emulator_address_may_lack_a_scheme(
    bucket: Bucket, remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url.removeprefix("http://"))
    remote.write("a", b"1")
    assert bucket.names("runs") == ["team/doctor-1/a"]


def test_missing_credentials_name_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(SetupError, match="gcloud auth application-default login"):
        open_store("gs://runs/r").read("a")


def test_credentials_of_netrc_do_not_replace_googles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("default login me password hunter2")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("google.auth.default", lambda **_: (AnonymousCredentials(), "project"))
    request = requests.Request(
        "GET", "https://storage.googleapis.com/", headers={"Authorization": "Bearer google"}
    )
    client.cache_clear()
    prepared = client("")._http.prepare_request(request)
    client.cache_clear()
    assert prepared.headers["Authorization"] == "Bearer google"


def test_only_the_bytes_of_transfers_count_as_progress(
    remote: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[None] = []
    monkeypatch.setattr(WATCHDOG, "beat", lambda: beats.append(None))
    version = remote.write_if_version("lease", b"1", None)
    remote.write_if_version("lease", b"2", version)
    assert not beats  # or renewing a lease would hide a stalled job
    (tmp_path / "big").write_bytes(bytes(9 * 1024 * 1024))
    remote.upload(tmp_path / "big", "big")
    sent = len(beats)
    assert sent >= 2
    remote.download("big", tmp_path / "copy")
    assert len(beats) > sent + 2
