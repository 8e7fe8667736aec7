"""The replies of the remote model, kept as they arrive: what was paid for is not asked for twice.

A bucket has no appending, so replies that arrived together become a small file of their own,
`evals/reference/partial/<number>.jsonl`. When all is asked, one file takes their place,
`evals/reference/replies.jsonl`: every request with its answer or error, who answered it, and
what it cost. A reply belongs to certain inputs; those of others are not read.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict

from pydantic import BaseModel, ConfigDict, ValidationError

from job.evals.api_client import Reply
from job.storage.base import Store

FILE = "evals/reference/replies.jsonl"


FOLDER = "evals/reference/partial/"


EVERY_SECONDS = 0.2
"""The least time between two files."""


class LoggedReply(BaseModel):
    """A line of the files: a reply to a question, with the fields of `chat_api.Reply`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    inputs: str
    number: int
    """In order of arrival."""
    eval: str
    id: str
    answer: str | None = None
    error: str | None = None
    final: bool = False
    provider: str | None = None
    model: str | None = None
    finish: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: float = 0.0
    lost: int = 0

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to ask."""
        return self.answer is not None or self.final


class ReplyLog:
    """All replies of a run to the same inputs, in order of arrival."""

    def __init__(self, store: Store, inputs: str) -> None:
        """Read what an earlier start left."""
        self._store = store
        self._inputs = inputs
        self._files = store.list(FOLDER)
        found = {}
        for key in (FILE, *self._files):
            for reply in _lines(store.read(key)):
                if reply.inputs == inputs:
                    found[reply.number] = reply
        self.all = [found[number] for number in sorted(found)]
        self._new: list[LoggedReply] = []
        self._written = 0.0

    def settled(self, name: str) -> dict[str, LoggedReply]:
        """The replies to an evaluation that leave nothing to ask, by the question's id."""
        return {reply.id: reply for reply in self.all if reply.eval == name and reply.settled}

    def add(self, name: str, question: str, reply: Reply) -> LoggedReply:
        """A reply that has arrived; it is on file after the next `write`."""
        fields = {name: value for name, value in asdict(reply).items() if name != "sent"}
        number = self.all[-1].number + 1 if self.all else 0
        kept = LoggedReply(inputs=self._inputs, number=number, eval=name, id=question, **fields)
        self.all.append(kept)
        self._new.append(kept)
        return kept

    def write(self, *, now: bool = False) -> None:
        """Put what has arrived on file, unless that was done a moment ago and is not urgent."""
        if self._new and (now or time.monotonic() - self._written >= EVERY_SECONDS):
            key = f"{FOLDER}{self._new[0].number:08d}.jsonl"
            self._store.write(key, _text(self._new))
            self._files.append(key)
            self._new = []
            self._written = time.monotonic()

    def content(self) -> bytes:
        """Return all replies as the content of `FILE`."""
        return _text(self.all)

    def delete_partial_files(self) -> None:
        """Delete the small files, once `FILE` is written."""
        for key in self._files:
            self._store.delete(key)


def _text(replies: Iterable[LoggedReply]) -> bytes:
    lines = (reply.model_dump_json(exclude_defaults=True) + "\n" for reply in replies)
    return "".join(lines).encode()


def _lines(content: bytes | None) -> Iterable[LoggedReply]:
    for line in (content or b"").split(b"\n"):
        try:
            yield LoggedReply.model_validate_json(line)
        except ValidationError:  # the end of the text, or written by another version
            continue
