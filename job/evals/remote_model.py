"""Evaluation of a remote model: concurrent requests and saved replies."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait

from job.chat.conversation import Conversation
from job.evals.api_client import ChatClient
from job.evals.predictions import Reply
from job.evals.reply_log import REPLY_SECONDS, ReplyLog
from job.runtime import logs
from job.runtime.threads import Threads
from job.runtime.watchdog import progress

_STOP_SECONDS = 10.0
"""Wait for requests in flight when the job is stopped."""


class RemoteModel:
    """A model behind a chat API; replies that the log has are not requested again."""

    def __init__(
        self, client: ChatClient, log: ReplyLog, concurrency: int, check: Callable[[], None]
    ) -> None:
        """Send up to `concurrency` requests at a time; `check` raises when the job must stop."""
        self._client = client
        self._log = log
        self._concurrency = concurrency
        self._check = check
        self._stopping = threading.Event()
        client.sleep = self._stopping.wait

    def complete(
        self, name: str, prompts: Mapping[str, Conversation], max_tokens: int | None = None
    ) -> Mapping[str, Reply]:
        """Return the replies to all prompts of an evaluation by id: saved ones and new ones.

        `max_tokens` limits an answer instead of the client's own limit.
        """
        replies: dict[str, Reply] = {**self._log.settled(name)}
        missing = [identity for identity in prompts if identity not in replies]
        saved = len(prompts) - len(missing)
        if saved:
            logs.get().info("replies loaded", eval=name, saved=saved, missing=len(missing))
        pool = Threads(self._concurrency)
        pending: dict[Future[Reply], str] = {
            pool.submit(self._client.complete, prompts[identity], max_tokens): identity
            for identity in missing
        }

        def collect(seconds: float) -> int:
            """Take the replies that arrive within some seconds; return their number."""
            done, _ = wait(pending, seconds, FIRST_COMPLETED)
            for future in done:
                identity, reply = pending.pop(future), future.result()
                replies[identity] = self._log.add(name, identity, reply) if reply.sent else reply
            return len(done)

        try:
            with progress(name, len(prompts), saved) as advance:
                while pending:
                    if arrived := collect(REPLY_SECONDS):
                        advance(arrived, cost_usd=self._log.cost_usd)
                    self._log.write()
                    self._check()
        except BaseException:  # requests in flight are paid for: save their replies
            self._log.write(force=True)
            self._client.closed = "the job was stopped"
            self._stopping.set()
            for future in [future for future in pending if future.cancel()]:
                del pending[future]
            wait(pending, _STOP_SECONDS)
            collect(0)
            raise
        finally:
            self._log.write(force=True)
            pool.shutdown(wait=False)
        return replies
