"""The stand-in services against the real clients of the services they stand in for."""

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from google.api_core.exceptions import BadRequest, NotFound, PreconditionFailed
from google.cloud import storage

from tests.services.base import Reply, Request, Service
from tests.services.bucket import GRANULE, Bucket
from tests.services.hub import Files, Hub
from tests.services.openrouter import PRICE, ROUTE, Misbehaviour, OpenRouter

ROWS = [{"question": f"{n} + {n}?", "answer": str(n + n)} for n in range(40)]


class Echo(Service):
    """Answers with the body it got, and crashes on request."""

    def respond(self, request: Request, body: bytes) -> Reply:
        if request.route == "/crash":
            raise ZeroDivisionError
        return Reply(200, body, {"Content-Type": "text/plain"})


def test_faults_come_in_order_and_are_used_up() -> None:
    with Echo() as echo:
        echo.faults.add("POST /a", status=503, times=2, headers={"Retry-After": "0"}, body=b"down")
        echo.faults.add("POST /", status=429)
        replies = [requests.post(f"{echo.url}/{path}", data=b"hi") for path in "aaaa"]
        assert [reply.status_code for reply in replies] == [503, 503, 429, 200]
        assert (replies[0].text, replies[0].headers["Retry-After"]) == ("down", "0")
        assert replies[3].content == b"hi"
        assert echo.faults.pending == []
        assert [request.length for request in echo.requested("POST /a")] == [2, 2, 2, 2]


def test_a_cut_connection_ends_inside_the_body_or_before_the_reply() -> None:
    with Echo() as echo:
        echo.faults.add("/long", cut_after=1000)
        echo.faults.add("/empty", cut_after=0)
        cut = requests.post(f"{echo.url}/long", data=b"x" * 5000, stream=True)
        assert cut.headers["Content-Length"] == "5000"
        with pytest.raises(requests.exceptions.ChunkedEncodingError, match="1000 bytes read"):
            assert cut.content
        with pytest.raises(requests.exceptions.ConnectionError):
            requests.get(f"{echo.url}/empty")


def test_a_stopped_service_answers_no_more_and_raises_its_own_errors() -> None:
    echo = Echo().start()
    with requests.Session() as session:
        url = echo.url
        assert session.get(url).ok
        with pytest.raises(requests.exceptions.ConnectionError):
            session.get(f"{url}/crash")
        with pytest.raises(ExceptionGroup) as raised:
            echo.stop()
        assert isinstance(raised.value.exceptions[0], ZeroDivisionError)
        with pytest.raises(requests.exceptions.ConnectionError):
            session.get(url)


def run_client(hub: Hub, home: Path, code: str, **variables: str) -> Any:
    """Run Python with the Hub's clients pointed at the stand-in; returns the JSON it prints."""
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        **variables,
    }
    # Arrow's threads can abort the interpreter while it shuts down, after correct work.
    leave = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    command = [sys.executable, "-c", code + leave]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def parquet(rows: list[dict[str, str]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_datasets_streams_jsonl_and_parquet_and_refuses_a_gated_one(tmp_path: Path) -> None:
    code = """
import datasets, json
def rows(name, **options):
    return list(datasets.load_dataset(name, split="train", streaming=True, **options))
try:
    rows("org/gated", token=False)
except datasets.exceptions.DatasetNotFoundError as error:
    refusal = str(error)
opened = rows("org/gated", token="hf_stand_in")
print(json.dumps([rows("org/lines"), rows("org/table", revision="main"), opened, refusal]))
"""
    with Hub() as hub:
        hub.add_repo("datasets", "org/lines", {"README.md": b"# Q\n", "train.jsonl": jsonl(ROWS)})
        hub.add_repo("datasets", "org/table", {"data/train-00000-of-00001.parquet": parquet(ROWS)})
        hub.add_repo("datasets", "org/gated", {"data/train.jsonl": jsonl(ROWS[:3])}, gated=True)
        lines, table, opened, refusal = run_client(hub, tmp_path, code)
    assert lines == table == ROWS
    assert opened == ROWS[:3]
    assert "gated dataset on the Hub. You must be authenticated" in refusal


def test_huggingface_hub_downloads_resolves_and_refuses(tmp_path: Path) -> None:
    code = """
import huggingface_hub as hub, json, os, pathlib
def refusal(call, *args, **options):
    try:
        call(*args, **options)
    except hub.errors.HfHubHTTPError as error:
        return [type(error).__name__, error.response.status_code]
def commit(path):
    return pathlib.Path(path).name
first = os.environ["COMMIT"]
get, snapshot, api = hub.hf_hub_download, hub.snapshot_download, hub.HfApi()
print(json.dumps({
    "snapshots": [commit(snapshot("org/model")), commit(snapshot("org/model", revision=first))],
    "config": pathlib.Path(get("org/model", "config.json", revision=first)).read_text(),
    "weights": pathlib.Path(get("org/model", "part/weights.bin")).stat().st_size,
    "paths": [item.path for item in api.get_paths_info("org/model", ["part", "no"], expand=True)],
    "tree": [item.path for item in api.list_repo_tree("org/model", "part")],
    "gated": api.model_info("org/gated").gated,
    "range": hub.HfFileSystem().read_block("org/model/part/weights.bin", 299_998, 10).decode(),
    "refusals": [
        refusal(get, "org/gated", "a/b c.txt"),
        refusal(get, "org/gated", "a/b c.txt", token="hf_stranger"),
        refusal(get, "org/model", "none.json"),
        refusal(snapshot, "org/model", revision="v9"),
        refusal(snapshot, "org/none"),
        refusal(snapshot, "org/none", token="hf_stand_in"),
    ],
    "opened": pathlib.Path(get("org/gated", "a/b c.txt", token="hf_stand_in")).read_text(),
}))
"""
    with Hub() as hub:
        files: Files = {"config.json": b"{}", "part/weights.bin": b"w" * 300_000}
        first = hub.add_repo("models", "org/model", files)
        second = hub.add_repo("models", "org/model", {**files, "config.json": b"[]"})
        hub.add_repo("models", "org/gated", {"a/b c.txt": b"secret"}, gated=True)
        hub.faults.add("GET /org/model/resolve/", cut_after=1)
        seen = run_client(hub, tmp_path, code, COMMIT=first)
        assert hub.faults.pending == []
    assert seen == {
        "snapshots": [second, first],
        "config": "{}",
        "weights": 300_000,
        "paths": ["part"],
        "tree": ["part/weights.bin"],
        "gated": "auto",
        "range": "ww",
        "opened": "secret",
        "refusals": [
            ["GatedRepoError", 401],
            ["GatedRepoError", 403],
            ["RemoteEntryNotFoundError", 404],
            ["RevisionNotFoundError", 404],
            ["RepositoryNotFoundError", 401],
            ["RepositoryNotFoundError", 404],
        ],
    }


@pytest.fixture
def runs(bucket: Bucket) -> storage.Bucket:
    return storage.Client(project="stand-in").bucket("runs")


def test_buckets_are_created_once_and_missing_ones_are_not_found(bucket: Bucket) -> None:
    client = storage.Client(project="stand-in")
    client.create_bucket("new")
    assert client.get_bucket("new").name == "new"
    assert not client.bucket("none").exists()
    with pytest.raises(NotFound):
        client.bucket("none").blob("a").upload_from_string(b"")


def test_an_object_is_uploaded_described_and_downloaded(
    bucket: Bucket, runs: storage.Bucket, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": 1}\r\n--b\r\n')
    blob = runs.blob("dir/ä b.json")
    blob.metadata = {"step": "7"}
    blob.upload_from_filename(tmp_path / "a.json")
    data = (tmp_path / "a.json").read_bytes()
    assert bucket.objects["runs", "dir/ä b.json"][:2] == (data, blob.generation)

    seen = runs.get_blob("dir/ä b.json")
    assert seen is not None
    assert (seen.size, seen.content_type, seen.metadata) == (
        len(data),
        "application/json",
        {"step": "7"},
    )
    assert seen.md5_hash == base64.b64encode(hashlib.md5(data).digest()).decode()
    assert seen.crc32c == base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()
    assert seen.download_as_bytes(checksum="md5") == seen.download_as_bytes(checksum="crc32c")
    assert seen.download_as_bytes(start=2, end=4) == data[2:5]
    beyond = requests.get(str(seen.media_link), headers={"Range": f"bytes={len(data)}-"})
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(data)}")
    assert runs.get_blob("none") is None

    media = f"{bucket.url}/upload/storage/v1/b/runs/o?uploadType=media&name=m"
    created = requests.post(media, data=b"m", headers={"Content-Type": "text/plain"}).json()
    assert (created["name"], created["size"], created["contentType"]) == ("m", "1", "text/plain")


def test_a_resumable_upload_goes_in_chunks_through_an_outage(
    bucket: Bucket, runs: storage.Bucket
) -> None:
    data = os.urandom(2 * GRANULE + 1000)
    bucket.faults.add("PUT /upload", cut_after=0)
    runs.blob("big", chunk_size=GRANULE).upload_from_file(io.BytesIO(data))
    ranges = [request.headers["Content-Range"] for request in bucket.requested("PUT /upload")]
    assert ranges[:2] == [f"bytes 0-{GRANULE - 1}/*"] * 2
    assert ranges[3] == f"bytes {2 * GRANULE}-{len(data) - 1}/{len(data)}"
    assert bucket.objects["runs", "big"].data == data

    bucket.faults.add("PUT /upload", cut_after=10)
    runs.blob("small", chunk_size=GRANULE).upload_from_file(io.BytesIO(b"s"), if_generation_match=0)
    assert bucket.objects["runs", "small"].data == b"s"

    with runs.blob("stream").open("wb", chunk_size=GRANULE) as stream:
        stream.write(data)
    assert bucket.objects["runs", "stream"].data == data


def test_a_download_that_is_cut_is_resumed_on_the_same_generation(
    bucket: Bucket, runs: storage.Bucket
) -> None:
    data = os.urandom(100_000)
    generation = bucket.put("runs", "big", data)
    bucket.faults.add("GET /download", cut_after=60_000)
    target = io.BytesIO()
    runs.blob("big").download_to_file(target)
    assert target.getvalue() == data
    resumed = bucket.requested("GET /download")[-1]
    assert resumed.query["generation"] == str(generation)
    assert resumed.headers["Range"].startswith("bytes=")


def test_preconditions_hold(bucket: Bucket, runs: storage.Bucket) -> None:
    blob = runs.blob("lock")
    blob.upload_from_string(b"1", if_generation_match=0)
    first = blob.generation
    with pytest.raises(PreconditionFailed):
        runs.blob("lock").upload_from_string(b"2", if_generation_match=0)
    with pytest.raises(PreconditionFailed):
        stream = io.BytesIO(b"2")
        runs.blob("lock", chunk_size=GRANULE).upload_from_file(stream, if_generation_match=0)
    blob.upload_from_string(b"2", if_generation_match=first)
    assert blob.generation > first
    with pytest.raises(PreconditionFailed):
        blob.delete(if_generation_match=first)
    with pytest.raises(NotFound):
        runs.blob("lock", generation=first).download_as_bytes()
    blob.delete(if_generation_match=blob.generation)
    assert bucket.objects == {}
    with pytest.raises(NotFound, match="No such object: runs/lock"):
        blob.delete()


def test_a_write_whose_reply_is_lost_meets_itself_on_the_retry(
    bucket: Bucket, runs: storage.Bucket
) -> None:
    bucket.faults.add("POST /upload", cut_after=5)
    with pytest.raises(PreconditionFailed):
        runs.blob("lock").upload_from_string(b"mine", if_generation_match=0)
    assert bucket.objects["runs", "lock"].data == b"mine"


def test_a_wrong_checksum_is_refused(bucket: Bucket, runs: storage.Bucket) -> None:
    blob = runs.blob("a")
    blob.md5_hash = base64.b64encode(bytes(16)).decode()
    with pytest.raises(BadRequest, match="md5Hash"):
        blob.upload_from_string(b"a", checksum=None)
    assert bucket.objects == {}


def test_listings_are_paged_and_folded(bucket: Bucket, runs: storage.Bucket) -> None:
    for name in ("a/1", "a/2", "a/b/3", "a/c/4", "z"):
        bucket.put("runs", name, b"")
    assert [blob.name for blob in runs.list_blobs(page_size=2)] == bucket.names("runs")
    assert len(bucket.requested("GET /storage/v1/b/runs/o")) == 3
    listing = runs.list_blobs(prefix="a/", delimiter="/", page_size=1)
    assert [blob.name for blob in listing] == ["a/1", "a/2"]
    assert listing.prefixes == {"a/b/", "a/c/"}
    with pytest.raises(BadRequest, match="matchGlob"):
        list(runs.list_blobs(match_glob="*"))


def test_objects_are_copied_and_renamed(bucket: Bucket, runs: storage.Bucket) -> None:
    generation = bucket.put("runs", "a", b"data", contentType="text/plain", metadata={"k": "v"})
    source = runs.blob("a")
    runs.copy_blob(source, runs, "b", if_source_generation_match=generation)
    assert runs.blob("c").rewrite(source)[0] is None
    with pytest.raises(PreconditionFailed):
        runs.copy_blob(source, runs, "b", if_generation_match=0)
    runs.rename_blob(source, "d")
    assert bucket.names("runs") == ["b", "c", "d"]
    assert bucket.objects["runs", "b"][2:4] == ("text/plain", {"k": "v"})


def ask(service: OpenRouter, text: str = "two words", key: str | None = None) -> requests.Response:
    """Send one chat, as a client of OpenRouter would."""
    chat = {"model": "org/model", "messages": [{"role": "user", "content": text}]}
    headers = {"Authorization": f"Bearer {key or service.key}"}
    return requests.post(service.url + ROUTE, json=chat, headers=headers)


def test_a_chat_is_answered_to_those_who_have_the_key() -> None:
    with OpenRouter(answer=lambda chat: chat["messages"][-1]["content"].upper()) as service:
        completion = ask(service).json()
        assert completion["choices"][0]["message"]["content"] == "TWO WORDS"
        assert completion["choices"][0]["finish_reason"] == "stop"
        assert (completion["id"], completion["model"]) == ("gen-1", "org/model")
        assert completion["provider"]
        assert completion["usage"] == {
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "total_tokens": 4,
            "completion_tokens_details": {"reasoning_tokens": 0},
            "cost": 4 * PRICE,
        }
        refused = ask(service, key="sk-wrong")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, 401)
        assert len(service.chats) == 1


def outcome(reply: requests.Response) -> tuple[int, bool, list[tuple[str, str, bool]]]:
    """The status, whether there is a top-level error, and what each choice holds."""
    body = reply.json()
    choices = [
        (choice["finish_reason"], choice["message"]["content"], "error" in choice)
        for choice in body.get("choices", [])
    ]
    return reply.status_code, "error" in body, choices


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ok", (200, False, [("stop", "ok", False)])),
        ("error", (200, True, [])),
        ("choice_error", (200, False, [("error", "", True)])),
        ("finish_error", (200, False, [("error", "", False)])),
        ("no_choices", (200, False, [])),
        ("length", (200, False, [("length", "", False)])),
        ("402", (402, True, [])),
        ("429", (429, True, [])),
        ("502", (502, True, [])),
    ],
)
def test_misbehaviour_is_scripted_by_name(name: Misbehaviour, expected: object) -> None:
    with OpenRouter(retry_after="3") as service:
        service.script.append(name)
        reply = ask(service)
        assert outcome(reply) == expected
        assert reply.headers.get("Retry-After") == ("3" if name == "429" else None)
        assert outcome(ask(service))[0] == 200


def test_misbehaviour_is_chosen_from_the_request() -> None:
    with OpenRouter() as service:
        service.misbehave = lambda chat: "cut" if "cut" in str(chat["messages"]) else "ok"
        assert ask(service, "fine").ok
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            ask(service, "cut")
