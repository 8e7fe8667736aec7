"""The Hugging Face Hub, read only: commits, listings and verified files, by `huggingface_hub`.

Files are named by commit, so nothing changes during a run. Each downloaded file is compared with
the size and the hash that its repository states: the SHA-256 of large files, git's blob id of
others. `HF_ENDPOINT` names another Hub; `HF_TOKEN` or `hf auth login` gives access to gated and
private repositories. Retries are `job.storage.retry`'s, for every request.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from job.errors import SetupError, StageError, UsageError
from job.runtime import logs
from job.runtime.threads import run_all
from job.storage.base import PARTIAL
from job.storage.download import Content, download
from job.storage.retry import (
    Attempts,
    TransientError,
    first_line,
    raise_if_transient,
    read_reply,
    report_progress,
    timeouts,
)

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

RepoType = Literal["dataset", "model"]
"""The type of a repository of the Hub."""

SCHEME = "hf://"
CARD_FILE = "README.md"
"""The card of a repository."""

_THREADS = 4
_AGENT = "job"
"""Begins the User-Agent header of the requests that follow our retry policy."""


def checksum(file: "RepoFile") -> str:
    """Return what identifies a file's content: the SHA-256 of a large one, or git's blob id."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def _content(file: "RepoFile") -> Content:
    """Return the content that a local copy of a file must have."""
    new: Callable[[], Any] = hashlib.sha256
    if not file.lfs:
        header = b"blob %d\0" % file.size
        new = functools.partial(hashlib.sha1, header, usedforsecurity=False)
    return Content(file.size, new, bytes.fromhex(checksum(file)))


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub; `revision` is the spec's name for the commit, for messages."""

    kind: RepoType
    name: str
    revision: str | None = None

    @property
    def page(self) -> str:
        """The address of its page on the website."""
        folder = "datasets/" if self.kind == "dataset" else ""
        return f"https://huggingface.co/{folder}{self.name}"

    def __str__(self) -> str:
        return f"the {self.kind} {SCHEME}{self.name}"

    def commit(self) -> str:
        """Return the commit that the revision names now.

        Raises:
            UsageError, SetupError, StageError: see `errors`.
        """
        with self.errors():
            info = _api().repo_info(
                self.name, repo_type=self.kind, revision=self.revision or "main"
            )
        return str(info.sha)

    def files(self, commit: str) -> "list[RepoFile]":
        """Return all files of a commit, sorted by path.

        Raises:
            UsageError, SetupError, StageError: see `errors`.
        """
        from huggingface_hub.hf_api import RepoFile

        with self.errors():
            tree = _api().list_repo_tree(
                self.name, recursive=True, revision=commit, repo_type=self.kind
            )
            files = [item for item in tree if isinstance(item, RepoFile)]
        return sorted(files, key=lambda file: file.path)

    def fetch(self, commit: str, files: "Sequence[RepoFile]", folder: Path) -> None:
        """Download files to a local folder, several at a time; correct local copies stay.

        A file appears under its name only when it is complete and correct.

        Raises:
            UsageError, SetupError, StageError: see `errors`.
        """
        _check_paths(files)
        fetch_file = self._fetch_file
        run_all([functools.partial(fetch_file, commit, file, folder) for file in files], _THREADS)

    def _fetch_file(self, commit: str, file: "RepoFile", folder: Path) -> None:
        path, content = folder / file.path, _content(file)
        if content.matches(path):
            return

        def get(scratch: Path) -> Path:
            with _transient_failures():
                local = _api().hf_hub_download(
                    self.name,
                    file.path,
                    repo_type=self.kind,
                    revision=commit,
                    local_dir=scratch,
                    cache_dir=scratch,
                    tqdm_class=_progress_class(),
                )
            return Path(local)

        with self.errors():
            download(f"read {file.path} of {self}", path, content, get)
        logs.get().info("downloaded", file=file.path, bytes=file.size, commit=commit[:12])

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the Hub's refusals within this block into errors with the way out.

        Raises:
            UsageError: there is no such repository, revision or file.
            SetupError: it is gated, the token is missing or wrong, or HF_HUB_OFFLINE is set.
            StageError: anything else.
        """
        import httpx2
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            OfflineModeIsEnabled,
        )

        try:
            yield
        except HfHubHTTPError as error:
            raise self._error(error) from error
        except HFValidationError as error:
            raise UsageError(f"{self}: {error}") from error
        except OfflineModeIsEnabled as error:
            raise SetupError(f"cannot read {self} in offline mode: unset HF_HUB_OFFLINE") from error
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise SetupError(
                f"HF_ENDPOINT={_endpoint()!r} is not the address of a Hub: {error}"
            ) from error

    def _error(self, error: "HfHubHTTPError") -> Exception:
        from huggingface_hub import errors, get_token

        token = "a token is set" if get_token() else "no token is set"
        reason = f"{error.response.status_code}: {first_line(error.server_message or str(error))}"
        if isinstance(error, errors.GatedRepoError):
            return SetupError(
                f"{self} is gated: accept its terms at {self.page} and set HF_TOKEN to a token "
                f"of the account that did ({token})"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return UsageError(f"{self} has no revision {self.revision!r}; see {self.page}")
        no_repository = error.response.status_code == 404 and type(error) is errors.HfHubHTTPError
        if isinstance(error, errors.RepositoryNotFoundError) or no_repository:
            return UsageError(
                f"there is no {self.kind} {SCHEME}{self.name}, or it is private: check the name, "
                f"ask for access at {self.page}, or set HF_TOKEN ({token})"
            )
        if isinstance(error, errors.EntryNotFoundError):
            return StageError(
                f"{self} does not have a file that it lists ({reason}); run the same command again"
            )
        if error.response.status_code in (401, 403):
            return SetupError(
                f"the Hub refuses {self} ({reason}): check HF_TOKEN ({token}), and that its "
                f"account may read {self.page}"
            )
        return StageError(f"cannot read {self} from the Hub: {reason}")


def _check_paths(files: "Sequence[RepoFile]") -> None:
    """Check that the paths of a listing stay inside the folder they are downloaded into."""
    for file in files:
        parts = file.path.split("/")
        if {"", ".", ".."} & set(parts) or parts[-1].startswith(PARTIAL):
            raise StageError(f"the repository lists {file.path!r}, which is outside the repository")
        if not file.path.isprintable() or "\\" in file.path:
            raise StageError(f"the repository lists {file.path!r}, which is not a name of a file")


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or "https://huggingface.co"


def _api() -> "HfApi":
    from huggingface_hub import HfApi, get_token

    _install_client()
    return HfApi(
        endpoint=_endpoint(), token=get_token() or False, library_name=_AGENT, library_version="1"
    )


@functools.cache
def _install_client() -> None:
    """Let `huggingface_hub` send this job's requests under our timeouts and retry policy.

    Requests of other libraries to the Hub are sent as always. The client never reads `.netrc`.
    """
    import httpx2
    from huggingface_hub import get_session, set_client_factory

    hooks = get_session().event_hooks

    class Client(httpx2.Client):
        def send(
            self, request: httpx2.Request, *, stream: bool = False, **options: Any
        ) -> httpx2.Response:
            send = functools.partial(super().send, request, **options)
            if not request.headers.get("User-Agent", "").startswith(f"{_AGENT}/"):
                return send(stream=stream)
            connect, stall = timeouts()
            request.extensions["timeout"] = httpx2.Timeout(stall, connect=connect).as_dict()
            url = request.url.copy_with(query=None, fragment=None)

            def reply() -> httpx2.Response:
                response = send(stream=True)
                return response if stream else _complete(response)

            return Attempts(f"{request.method} {url}").run(lambda: _send_once(reply))

    def factory() -> httpx2.Client:
        return Client(event_hooks=hooks, follow_redirects=True, timeout=None)

    set_client_factory(factory)


def _complete(response: "httpx2.Response") -> "httpx2.Response":
    """Read the body of a reply that is no file."""
    import httpx2

    with contextlib.closing(response):
        content = read_reply(response.iter_bytes(), str(response.url.copy_with(query=None)))
    body = ("content-encoding", "content-length", "transfer-encoding")
    return httpx2.Response(
        response.status_code,
        headers=[(k, v) for k, v in response.headers.multi_items() if k.lower() not in body],
        content=content,
        request=response.request,
        extensions=response.extensions,
        history=response.history,
    )


def _send_once(send: Callable[[], "httpx2.Response"]) -> "httpx2.Response":
    """Return the reply to one request."""
    with _transient_failures():
        response = send()
        try:
            raise_if_transient(
                response.status_code, response.reason_phrase, response.headers.get("Retry-After")
            )
        except TransientError:
            response.close()
            raise
        if response.is_closed and response.is_success and response.content:  # not a file
            response.json()
        return response


@contextlib.contextmanager
def _transient_failures() -> Iterator[None]:
    """Turn the failures of `huggingface_hub` that may pass into `TransientError`."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError as error:  # it could not ask about the file
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise error.__cause__ from None
        raise TransientError(str(error.__cause__ or error)) from error
    except (httpx2.UnsupportedProtocol, errors.OfflineModeIsEnabled):
        raise
    except errors.HfHubHTTPError as error:
        if error.response.status_code != 416:
            raise
        raise TransientError("the server has less of the file than it stated") from error
    except (httpx2.RequestError, RuntimeError) as error:  # RuntimeError: of Xet
        raise TransientError(f"{type(error).__name__}: {error}") from error
    except json.JSONDecodeError as error:
        raise TransientError("the reply is not valid JSON") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise TransientError(str(error)) from error


def _progress_class() -> type[Any]:
    """Return a progress bar that shows nothing and reports progress to the watchdog."""
    from huggingface_hub.utils.tqdm import tqdm

    class Progress(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **(options | {"disable": True}))  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            report_progress()
            super().update(n)

    return Progress
