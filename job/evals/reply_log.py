"""Replies of the remote model, saved as they arrive, so that nothing is paid for twice.

Object stores cannot append, so replies that arrive together become a small file of their own. At
the end one file replaces them: every request with its answer or error, its provider, and its cost.
Each reply carries a digest of the inputs it belongs to; replies to other inputs are ignored.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from job.evals.predictions import Reply
from job.storage.base import Store

REPLY_SECONDS = 0.2
"""Minimum seconds between two files."""


@dataclass(frozen=True, kw_only=True)
class LoggedReply(Reply):
    """A line of the files: the reply to one question of an evaluation."""

    inputs: str
    """Digest of the inputs."""
    number: int
    """Position in the order of arrival."""
    eval: str
    id: str


_LINE = TypeAdapter(LoggedReply)


class ReplyLog:
    """All replies of a run to the same inputs, in order of arrival."""

    def __init__(self, store: Store, key: str, partial_folder: str, inputs_digest: str) -> None:
        """Read the replies that earlier starts saved in the file `key` and the partial files.

        `inputs_digest` is of what the replies depend on.
        """
        self._store = store
        self._partial_folder = partial_folder
        self._inputs_digest = inputs_digest
        self._partial_keys = store.list(partial_folder)
        replies = {}
        for saved in (key, *self._partial_keys):
            for reply in _parse(store.read(saved)):
                if reply.inputs == inputs_digest:
                    replies[reply.number] = reply
        self.replies = [replies[number] for number in sorted(replies)]
        self._unwritten: list[LoggedReply] = []
        self._written = 0.0

    @property
    def cost_usd(self) -> float:
        """Dollars that all replies cost."""
        return sum(reply.cost_usd for reply in self.replies)

    def settled(self, name: str) -> dict[str, LoggedReply]:
        """Return an evaluation's replies by question id, but for those to be requested again."""
        replies = [reply for reply in self.replies if reply.eval == name]
        return {reply.id: reply for reply in replies if reply.answer is not None or reply.final}

    def add(self, name: str, question_id: str, reply: Reply) -> LoggedReply:
        """Add a reply; the next `write` saves it."""
        number = self.replies[-1].number + 1 if self.replies else 0
        logged = LoggedReply(
            inputs=self._inputs_digest, number=number, eval=name, id=question_id, **vars(reply)
        )
        self.replies.append(logged)
        self._unwritten.append(logged)
        return logged

    def write(self, *, force: bool = False) -> None:
        """Save new replies if the last write was `REPLY_SECONDS` ago, or if forced."""
        if self._unwritten and (force or time.monotonic() - self._written >= REPLY_SECONDS):
            key = f"{self._partial_folder}{self._unwritten[0].number:08d}.jsonl"
            self._store.write(key, _format(self._unwritten))
            self._partial_keys.append(key)
            self._unwritten = []
            self._written = time.monotonic()

    def content(self) -> bytes:
        """Return the content of the file that replaces the partial ones."""
        return _format(self.replies)

    def delete_partial(self) -> None:
        """Delete the partial files."""
        for key in self._partial_keys:
            self._store.delete(key)


def _format(replies: Iterable[LoggedReply]) -> bytes:
    return b"".join(_LINE.dump_json(reply, exclude_defaults=True) + b"\n" for reply in replies)


def _parse(content: bytes | None) -> Iterable[LoggedReply]:
    for line in (content or b"").split(b"\n"):
        try:
            yield _LINE.validate_json(line)
        except ValidationError:  # the end of the text, or a line of another version
            continue
