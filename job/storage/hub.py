"""The Hugging Face Hub, read only: commits, listings, and files with their checksums checked.

Files are named by commit, so nothing changes under a run. Each file is compared with the size
and the hash that its repository keeps (SHA-256 of large files, git's own of small ones).
`HF_ENDPOINT` names another Hub, `HF_TOKEN` opens gated and private repositories.
"""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from job.errors import SetupError, StageError, UsageError
from job.runtime import logs
from job.runtime.threads import Threads
from job.storage.base import PARTIAL
from job.storage.partial import Content
from job.storage.retry import TransientError, retrying
from job.storage.transfer import Client, RefusedError

Kind = Literal["dataset", "model"]


SCHEME = "hf://"


README = "README.md"
"""The card of a repository."""


_AT_ONCE = 4


_COMMIT = re.compile(r"[0-9a-f]{40}")


_NEXT = re.compile(r'<([^>]+)>;\s*rel="next"')


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at a commit; `sha256` is set for large files, `sha1` for others."""

    path: str
    size: int
    sha256: str | None
    sha1: str
    """The id that git gives to the content."""

    @property
    def content(self) -> Content:
        """What a local copy should be."""
        if self.sha256:
            return Content(self.size, hashlib.sha256, self.sha256)
        header = b"blob %d\0" % self.size
        new = functools.partial(hashlib.sha1, header, usedforsecurity=False)
        return Content(self.size, new, self.sha1)


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub; `revision` is what the spec calls it, for messages."""

    kind: Kind
    name: str
    revision: str | None = None

    @property
    def page(self) -> str:
        """Its address for people."""
        return f"https://huggingface.co/{self._folder}{self.name}"

    @property
    def _folder(self) -> str:
        return "datasets/" if self.kind == "dataset" else ""

    @property
    def _api(self) -> str:
        return f"{_endpoint()}/api/{self.kind}s/{self.name}"

    def __str__(self) -> str:
        return f"the {self.kind} {SCHEME}{self.name}"

    def commit(self) -> str:
        """The commit that the revision names now.

        Raises:
            UsageError, EnvironmentProblem, StageError: see `errors`.
        """
        with self.errors():
            info = self._agreed(f"{self._api}/revision/{quote(self.revision or 'main', safe='')}")
        return str(info["sha"])

    def files(self, commit: str) -> list[HubFile]:
        """All files of a commit, sorted by path.

        Raises:
            UsageError, EnvironmentProblem, StageError: see `errors`.
        """
        found: list[HubFile] = []
        url: str | None = f"{self._api}/tree/{commit}?recursive=true"
        with self.errors():
            while url:
                entries, url = self._agreed(url, pages=True)
                found += [_file(entry) for entry in entries if entry["type"] == "file"]
        return sorted(found, key=lambda file: file.path)

    def fetch(self, commit: str, files: Sequence[HubFile], folder: Path) -> None:
        """Bring files to a local folder, several at once; those that are there are kept.

        A file appears under its name only when it is whole and right. Interrupted, the next
        call goes on where this one stopped.

        Raises:
            UsageError, EnvironmentProblem, StageError: see `errors`.
        """
        check_paths(files)
        missing = [file for file in files if not _is_there(folder, file)]
        with Threads(_AT_ONCE) as pool:
            jobs = [pool.submit(self._fetch_one, commit, file, folder) for file in missing]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fetch_one(self, commit: str, file: HubFile, folder: Path) -> None:
        address = f"{_endpoint()}/{self._folder}{self.name}/resolve/{commit}/{quote(file.path)}"
        what = f"read {file.path} of {self}"
        with self.errors():
            path = folder / file.path
            path.unlink(missing_ok=True)
            client().download(what, address, path, file.content)
        logs.get().info("fetched from the Hub", file=file.path, bytes=file.size, commit=commit[:12])

    def _agreed(self, url: str, *, pages: bool = False) -> Any:
        """A reply that came twice the same: nothing else vouches for what the API says."""

        def once() -> tuple[bytes, Any]:
            reply = client().get(url)
            parsed = reply.json()
            if not pages:
                if not isinstance(parsed, dict) or not _COMMIT.fullmatch(str(parsed.get("sha"))):
                    raise TransientError("the reply names no commit")
                return str(parsed["sha"]).encode(), parsed
            following = _NEXT.search(reply.headers.get("link", ""))
            address = None
            if following:  # on this endpoint, whatever it calls itself: the token goes along
                rest = urlsplit(following[1])
                address = f"{_endpoint()}{rest.path}?{rest.query}"
            return reply.content + (address or "").encode(), (parsed, address)

        def twice() -> Any:
            first, _ = once()
            second, made = once()
            if first != second:
                raise TransientError("two replies to the same request differ")
            return made

        return retrying(f"ask about {self}", twice)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turns what the Hub refuses in this block into errors with the way out.

        Raises:
            UsageError: there is no such repository, revision or file.
            EnvironmentProblem: it is gated, or the token is missing or wrong.
            StageError: anything else.
        """
        try:
            yield
        except RefusedError as refused:
            raise self._error(refused) from refused

    def _error(self, refused: RefusedError) -> Exception:
        code = refused.headers.get("X-Error-Code", "")
        token = "HF_TOKEN is set" if _token() else "HF_TOKEN is not set"
        if code == "GatedRepo":
            return SetupError(
                f"{self} is gated: accept its terms at {self.page} and set HF_TOKEN to a token "
                f"of the account that did ({token})"
            )
        if code == "RevisionNotFound":
            return UsageError(f"{self} has no revision {self.revision!r}; see {self.page}")
        if code == "RepoNotFound" or (refused.status == 404 and not code):
            return UsageError(
                f"there is no {self.kind} {SCHEME}{self.name}, or it is private: check the name, "
                f"or set HF_TOKEN ({token})"
            )
        if code == "EntryNotFound":
            return StageError(
                f"{self} does not have a file that it lists: {refused}; run the same command again"
            )
        if refused.status in (401, 403):
            return SetupError(
                f"the Hub refuses {self} ({refused}): check HF_TOKEN ({token}), and that its "
                f"account may read {self.page}"
            )
        return StageError(f"the Hub could not give {self}: {refused}")


def _file(entry: Any) -> HubFile:
    lfs = entry.get("lfs") or {}
    return HubFile(
        path=str(entry["path"]),
        size=int(lfs.get("size", entry["size"])),
        sha256=lfs.get("oid"),
        sha1=str(entry["oid"]),
    )


def _is_there(folder: Path, file: HubFile) -> bool:
    path = folder / file.path
    return path.is_file() and file.content.is_that_of(path)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"


def _token() -> str:
    return os.environ.get("HF_TOKEN", "").strip()


@functools.cache
def client() -> Client:
    """The connections to the Hub; the token goes to no other host, redirects included."""
    import requests

    class Bearer(requests.auth.AuthBase):
        def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
            if token := _token():
                request.headers["Authorization"] = f"Bearer {token}"
            return request

    session = requests.Session()
    session.auth = Bearer()
    session.headers["User-Agent"] = "job"
    return Client(session)


def check_paths(files: Sequence[HubFile]) -> None:
    """Raise if a path of a listing would leave the folder it is fetched into.

    Raises:
        StageError: it would.
    """
    for file in files:
        parts = file.path.split("/")
        if file.path.startswith("/") or ".." in parts or parts[-1].startswith(PARTIAL):
            raise StageError(f"the repository lists {file.path!r}, which is no path inside it")
