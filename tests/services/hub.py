"""A stand-in for the Hugging Face Hub: datasets and models read from memory.

It answers what `datasets.load_dataset` (streaming or not), `huggingface_hub.hf_hub_download`,
`snapshot_download` and `HfFileSystem` ask of the Hub when they read. Clients reach it through
`HF_ENDPOINT`, which they read at import: start them in a subprocess. As on the Hub, a gated
repository shows its metadata and file list to everyone and withholds the files.

Files of at least `large` bytes are stored as in Git LFS: the listing has their SHA-256,
and the reply to a request for one is a redirect to another origin, a `Cdn`.

Left out: every write, spaces, Xet storage, the card's metadata, branches other than main, tags,
search, and the dataset viewer, which clients look for at `datasets-server.<host>`: on loopback
they find no such host and carry on.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qs, unquote

from tests.services.base import Reply, Request, Service, json_reply, ranged_reply

_DATE = "2025-01-01T00:00:00.000Z"
_ID = r"(?P<id>(?:[^/]+/)?[^/]+?)"
_FILE = re.compile(rf"/(?P<kind>datasets/|){_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API = re.compile(
    rf"/api/(?P<kind>datasets|models)/{_ID}"
    r"(?:/auth-check|/(?P<verb>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
Files = Mapping[str, bytes]


class HubError(Exception):
    """A refusal, with the code that clients turn into their exceptions."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.reply = json_reply(
            {"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message}
        )


@dataclass
class Repo:
    """A repository: its commits, each with all of its files, and the head of main."""

    gated: bool
    private: bool
    head: str
    commits: dict[str, Files] = field(default_factory=dict)


@functools.lru_cache(maxsize=64)
def blob_id(data: bytes) -> str:
    """The id git gives to a file's content; the Hub's ETag for a file outside Git LFS."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@functools.lru_cache(maxsize=64)
def sha256_of(data: bytes) -> str:
    """The id that Git LFS gives to a file's content."""
    return hashlib.sha256(data).hexdigest()


def commit_id(files: Files) -> str:
    """A commit sha that depends on the paths and the contents alone."""
    lines = sorted(f"{blob_id(data)} {path}" for path, data in files.items())
    return hashlib.sha1("\n".join(lines).encode()).hexdigest()


class Cdn(Service):
    """Where large files are: they have an address that is as good as a key."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}

    def respond(self, request: Request, body: bytes) -> Reply:
        """Serve a file; a token that is sent here is sent to the wrong place."""
        data = self.files.get(request.route.strip("/"))
        if request.bearer is not None or data is None:
            return Reply(403, b"AccessDenied")
        return ranged_reply(data, request.headers.get("Range"), {"ETag": f'"{blob_id(data)}"'})


class Hub(Service):
    """The Hub; `token` opens what is gated or private, and any other token is a stranger's.

    A listing has `page_size` entries a page.
    """

    def __init__(
        self, token: str = "hf_stand_in", large: int | None = None, page_size: int = 1000
    ) -> None:
        super().__init__()
        self.token = token
        self.cdn = Cdn()
        self.page_size = page_size
        self._large = large
        self._repos: dict[tuple[str, str], Repo] = {}

    def start(self) -> Self:
        """Listen, the other origin too."""
        self.cdn.start()
        return super().start()

    def stop(self) -> None:
        """Stop listening."""
        self.cdn.stop()
        super().stop()

    def is_large(self, data: bytes) -> bool:
        """Return whether a file is stored as in Git LFS."""
        return self._large is not None and len(data) >= self._large

    def add_repo(
        self, kind: str, repo_id: str, files: Files, gated: bool = False, private: bool = False
    ) -> str:
        """Commit `files` to main of a repository of `kind` "datasets" or "models".

        Returns the commit's sha. A second call for the same repository is a new commit with
        exactly these files; the earlier commits stay reachable by their sha.
        """
        if kind not in ("datasets", "models"):
            raise ValueError(f"kind is 'datasets' or 'models', not {kind!r}")
        sha = commit_id(files)
        earlier = self._repos.get((kind, repo_id))
        commits = {**(earlier.commits if earlier else {}), sha: dict(files)}
        self._repos[kind, repo_id] = Repo(gated, private, sha, commits)
        for data in files.values():
            if self.is_large(data):
                self.cdn.files[sha256_of(data)] = data
        return sha

    def respond(self, request: Request, body: bytes) -> Reply:
        """Serve a file or an API call."""
        try:
            if match := _API.fullmatch(request.route):
                return self._api(request, body, match)
            if request.method in ("GET", "HEAD") and (match := _FILE.fullmatch(request.route)):
                return self._file(request, match)
        except HubError as error:
            return error.reply
        return json_reply({"error": "Sorry, we can't find the page you are looking for."}, 404)

    def _repo(self, request: Request, kind: str, repo_id: str) -> Repo:
        repo = self._repos.get((kind, repo_id))
        if repo is not None and repo.private and request.bearer != self.token:
            repo = None
        if repo is None and request.bearer is None:
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        if repo is None:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return repo

    def _open_gate(self, request: Request, repo: Repo, repo_id: str) -> None:
        """Let the holder of the token pass where a repository is gated."""
        if not repo.gated or request.bearer == self.token:
            return
        message = f"Access to {repo_id} is restricted."
        if request.bearer is None:
            raise HubError(401, "GatedRepo", f"{message} You must be authenticated to access it.")
        raise HubError(403, "GatedRepo", f"{message} You are not in the authorized list.")

    def _file(self, request: Request, match: re.Match[str]) -> Reply:
        repo_id, path = unquote(match["id"]), unquote(match["path"])
        repo = self._repo(request, match["kind"].rstrip("/") or "models", repo_id)
        self._open_gate(request, repo, repo_id)
        sha = _resolve(repo, match["revision"])
        data = repo.commits[sha].get(path)
        if data is None:
            raise HubError(404, "EntryNotFound", "Entry not found")
        if self.is_large(data):
            headers = {
                "Location": f"{self.cdn.url}/{sha256_of(data)}",
                "X-Linked-Etag": f'"{sha256_of(data)}"',
                "X-Linked-Size": str(len(data)),
                "X-Repo-Commit": sha,
            }
            return Reply(302, b"", headers)
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": f'"{blob_id(data)}"',
            "X-Repo-Commit": sha,
        }
        return ranged_reply(data, request.headers.get("Range"), headers)

    def _api(self, request: Request, body: bytes, match: re.Match[str]) -> Reply:
        repo_id = unquote(match["id"])
        repo = self._repo(request, match["kind"], repo_id)
        sha = _resolve(repo, match["revision"] or "main")
        files, query = repo.commits[sha], request.query
        if request.route.endswith("/auth-check"):
            self._open_gate(request, repo, repo_id)
            return json_reply({})
        headers: dict[str, str] = {}
        if match["verb"] == "tree":
            recursive = query.get("recursive", "").lower() == "true"
            folder = unquote(match["path"] or "").strip("/")
            entries = _tree(files, folder, recursive)
            first = int(query.get("cursor", 0))
            if following := entries[first + self.page_size :]:
                cursor = first + self.page_size
                link = f"<{self.url}{request.route}?recursive={recursive}&cursor={cursor}>"
                headers["Link"] = f'{link}; rel="next"'
            entries = entries[first : len(entries) - len(following)]
        elif match["verb"] == "paths-info":
            form = _form(request, body)
            entries = [entry for path in form["paths"] for entry in _entry(files, path)]
            query = {"expand": str(form.get("expand", [""])[0])}
        else:
            blobs = query.get("blobs", "").lower() == "true"
            return json_reply(_info(match["kind"], repo_id, repo, sha, blobs))
        if query.get("expand", "").lower() == "true":
            commit = {"id": sha, "title": "Add files", "date": _DATE}
            entries = [{**entry, "lastCommit": commit} for entry in entries]
        for entry in entries:
            data = files.get(entry["path"], b"")
            if self.is_large(data):
                entry["lfs"] = {"oid": sha256_of(data), "size": len(data), "pointerSize": 134}
        return json_reply(entries, headers=headers)


def _resolve(repo: Repo, revision: str) -> str:
    sha = repo.head if unquote(revision) == "main" else revision
    if sha not in repo.commits:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
    return sha


def _form(request: Request, body: bytes) -> dict[str, list[str]]:
    """The fields of a body that came as JSON or as a web form."""
    if "json" not in request.headers.get("Content-Type", ""):
        return parse_qs(body.decode())
    fields = json.loads(body)
    return {name: value if isinstance(value, list) else [value] for name, value in fields.items()}


def _entry(files: Files, path: str) -> list[dict[str, Any]]:
    """The description of the file or the folder at `path`; nothing where there is neither."""
    if path in files:
        size = len(files[path])
        return [{"type": "file", "oid": blob_id(files[path]), "size": size, "path": path}]
    inside = {name: data for name, data in files.items() if name.startswith(f"{path}/")}
    if not inside:
        return []
    return [{"type": "directory", "oid": commit_id(inside), "size": 0, "path": path}]


def _tree(files: Files, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What lies in `folder`, the sub-folders' content as well where `recursive`."""
    prefix = f"{folder}/" if folder else ""
    paths: set[str] = set()
    for name in files:
        if name.startswith(prefix):
            parts = name.removeprefix(prefix).split("/")
            depth = len(parts) if recursive else 1
            paths.update(prefix + "/".join(parts[: end + 1]) for end in range(depth))
    if not paths and folder:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist")
    return [entry for path in sorted(paths) for entry in _entry(files, path)]


def _info(kind: str, repo_id: str, repo: Repo, sha: str, blobs: bool) -> dict[str, Any]:
    """The metadata of a repository at a commit; the files' sizes and ids where `blobs`."""
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(repo.commits[sha])]
    if blobs:
        for sibling in siblings:
            data = repo.commits[sha][sibling["rfilename"]]
            sibling |= {"size": len(data), "blobId": blob_id(data)}
    return {
        "_id": sha[:24],
        "id": repo_id,
        **({"modelId": repo_id} if kind == "models" else {}),
        "author": repo_id.partition("/")[0],
        "sha": sha,
        "createdAt": _DATE,
        "lastModified": _DATE,
        "private": False,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
    }
