"""Evaluation of a remote model: concurrent requests, saved replies, replies to prediction lines."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from job.chat.conversation import Conversation
from job.data.examples import Example
from job.evals.answer_parsing import parse_choice
from job.evals.api_client import ChatClient, Reply
from job.evals.metrics import dialogue_line
from job.evals.predictions import (
    DIALOGUE,
    SIDE_BY_SIDE,
    ChoiceLine,
    DialogueLine,
    SideLine,
    TextLine,
    choice_line,
)
from job.evals.reply_log import REPLY_SECONDS, ReplyLog
from job.evals.tasks import SideBySidePrompt, Task, TextTask, question_messages, text_lines
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

    def answer_questions(self, task: Task) -> list[ChoiceLine]:
        """Return predictions for a task."""
        ids = [question.id for question in task.questions]
        replies = self.complete(
            task.entry.name, dict(zip(ids, question_messages(task), strict=True))
        )
        lines = []
        for question in task.questions:
            reply = replies[question.id]
            choice = parse_choice(reply.answer, question.options) if reply.answer else None
            finish = reply.finish or "stop"
            lines.append(choice_line(question, choice, finish=finish, **_reply_fields(reply)))
        return lines

    def answer_examples(
        self, examples: Sequence[Example], max_tokens: int | None
    ) -> list[DialogueLine]:
        """Return predictions for held-out examples.

        Args:
            examples: the held-out examples.
            max_tokens: limit of an answer; None takes the client's.
        """
        prompts = {example.id: example.prompt_messages for example in examples}
        replies = self.complete(DIALOGUE, prompts, max_tokens)
        lines = []
        for example in examples:
            reply = replies[example.id]
            fields = _reply_fields(reply) | {"answer": reply.answer or ""}
            fields |= {"tokens": reply.completion_tokens, "finish": reply.finish or "none"}
            lines.append(dialogue_line(example, **fields))
        return lines

    def answer_task(self, task: TextTask, max_tokens: int | None) -> list[TextLine]:
        """Return predictions for a task with free answers; see `answer_examples`."""
        prompts = {example.id: example.prompt_messages for example in task.examples}
        replies = self.complete(task.entry.name, prompts, max_tokens)
        fields = [
            _reply_fields(replies[identity]) | {"finish": replies[identity].finish or "stop"}
            for identity in prompts
        ]
        return text_lines(task, fields)

    def answer_side_by_side(self, prompts: Sequence[SideBySidePrompt]) -> list[SideLine]:
        """Return answers to the prompts shown side by side."""
        replies = self.complete(SIDE_BY_SIDE, {prompt.id: prompt.messages for prompt in prompts})
        return [
            SideLine(id=p.id, prompt=p.text, expected=p.expected, **_reply_fields(replies[p.id]))
            for p in prompts
        ]

    def complete(
        self, name: str, prompts: Mapping[str, Conversation], max_tokens: int | None = None
    ) -> Mapping[str, Reply]:
        """Return the replies to all prompts by id: saved ones and new ones."""
        replies: dict[str, Reply] = {}
        replies |= self._log.settled(name)
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


def _reply_fields(reply: Reply) -> dict[str, Any]:
    """Return the fields of a line that come from any reply."""
    return {
        "answer": reply.answer,
        "thoughts": reply.thoughts,
        "error": reply.error,
        "final": reply.final,
        "provider": reply.provider,
        "model": reply.model,
    }
