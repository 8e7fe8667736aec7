"""The reference stage: the same questions and prompts to a larger model far away.

Without a key the stage is skipped and says so. A request that fails leaves a missing answer,
never a wrong one, and never costs the run its other results. Replies are kept as they arrive:
the same command run again asks only what is still open.
"""

import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from pydantic import BaseModel

from job.chat.conversation import Conversation
from job.evals.answer_parsing import parse_choice
from job.evals.api_client import KEY, Budget, ChatClient, Reply, missing_key
from job.evals.metrics import rouge_scores
from job.evals.predictions import (
    DIALOGUE,
    SIDE_BY_SIDE,
    ChoiceLine,
    DialogueLine,
    SideLine,
    choice_line,
    format_predictions,
    predictions_key,
)
from job.evals.reply_log import REPLIES_KEY, WRITE_EVERY_SECONDS, LoggedReply, ReplyLog
from job.evals.tasks import load_task, question_messages
from job.pipeline.data_stage import VALIDATION, read_examples
from job.pipeline.eval_stage import side_prompts
from job.pipeline.run import Run
from job.results import ReferenceResult, ReferenceTokens
from job.runtime import logs
from job.runtime.threads import Threads
from job.runtime.watchdog import progress
from job.spec.schema import DialogueEval, MultipleChoiceEval, Reference

_LAST_SECONDS = 10.0
"""Waited for replies under way when the job is stopped."""


class ReferenceOutcome(BaseModel):
    """What the reference stage found out."""

    result: ReferenceResult
    open: bool
    """Some questions have no answer that asking again could give."""
    stopped_at_usd: float | None = None
    """The budget, where it ended the asking."""


def run_stage(run: Run) -> ReferenceOutcome:
    """Ask the reference model what the others were asked."""
    reference = run.spec.reference
    if reference is None:
        return _skipped(None, "the spec names no reference model", can_be_asked=False)
    missing = missing_key(reference)
    if missing:
        logs.get().warning(missing)
        return _skipped(reference.model, f"{KEY} is not set", can_be_asked=True)
    asking = _Asking(run, reference)
    for entry in run.spec.reference_slices:
        asking.multiple_choice(entry)
    if reference.dialogue and run.spec.evals.dialogue is not None:
        asking.dialogue(run.spec.evals.dialogue)
    asking.side_by_side()
    return asking.outcome()


class _Asking:
    """One pass over everything there is to ask, and the sums over all replies."""

    def __init__(self, run: Run, reference: Reference) -> None:
        self._run = run
        self._reference = reference
        self._kept = ReplyLog(run.store, run.digests["reference"])
        self._stopping = threading.Event()
        costs = [reply.cost_usd for reply in self._kept.replies if reply.answer is not None]
        self._client = ChatClient(
            reference.base_url,
            os.environ[KEY].strip(),
            reference.model,
            reference.max_tokens,
            reference.timeout_seconds,
            reference.attempts,
            sleep=self._stopping.wait,
            openrouter=reference.is_openrouter,
            reasoning=reference.reasoning,
            budget=Budget(reference.max_usd, self._cost(), max(costs, default=None)),
        )
        self._lines: list[ChoiceLine | DialogueLine | SideLine] = []

    def _cost(self) -> float:
        return sum(reply.cost_usd for reply in self._kept.replies)

    def multiple_choice(self, entry: MultipleChoiceEval) -> None:
        """Ask the questions of a slice and keep the lines."""
        found = load_task(entry, self._run.revisions)
        questions = found.questions
        ids = [question.id for question in questions]
        prompts = dict(zip(ids, question_messages(found), strict=True))
        replies = self._ask_all(entry.name, prompts)
        self._keep(
            entry.name,
            [
                choice_line(
                    question,
                    parse_choice(reply.answer, question.options) if reply.answer else None,
                    answer=reply.answer,
                    **_common(reply),
                )
                for question, reply in ((q, replies[q.id]) for q in questions)
            ],
        )

    def dialogue(self, wanted: DialogueEval) -> None:
        """Ask the held-out prompts, with the other models' limit where there is no reasoning."""
        examples = read_examples(self._run, VALIDATION, wanted.max_examples)
        prompts = {example.id: example.prompt_messages for example in examples}
        limit = wanted.max_new_tokens if self._reference.reasoning == "none" else None
        replies = self._ask_all(DIALOGUE, prompts, limit)
        self._keep(
            DIALOGUE,
            [
                DialogueLine(
                    id=e.id,
                    prompt=e.prompt,
                    expected=e.response,
                    answer=reply.answer or "",
                    tokens=reply.completion_tokens,
                    finish=reply.finish or "none",
                    **rouge_scores(e.response, reply.answer or ""),
                    **_common(reply),
                )
                for e, reply in ((e, replies[e.id]) for e in examples)
            ],
        )

    def side_by_side(self) -> None:
        """Ask the prompts that every model is shown."""
        prompts = side_prompts(self._run)
        replies = self._ask_all(SIDE_BY_SIDE, {prompt.id: prompt.messages for prompt in prompts})
        self._keep(
            SIDE_BY_SIDE,
            [
                SideLine(
                    id=p.id,
                    prompt=p.text,
                    expected=p.expected,
                    answer=replies[p.id].answer,
                    **_common(replies[p.id]),
                )
                for p in prompts
            ],
        )

    def _keep(self, name: str, lines: Sequence[ChoiceLine | DialogueLine | SideLine]) -> None:
        self._run.put(predictions_key("reference", name), format_predictions(lines))
        self._lines += lines

    def _ask_all(
        self, name: str, prompts: Mapping[str, Conversation], max_tokens: int | None = None
    ) -> Mapping[str, Reply | LoggedReply]:
        """Return the replies to all prompts by id: those on file, and new ones."""
        replies: dict[str, Reply | LoggedReply] = {}
        replies |= self._kept.settled(name)
        missing = [identity for identity in prompts if identity not in replies]
        known = len(prompts) - len(missing)
        if known:
            logs.get().info("answers are on file", eval=name, known=known, to_ask=len(missing))
        pool = Threads(self._reference.concurrency)
        waiting = {
            pool.submit(self._client.ask, prompts[identity], max_tokens): identity
            for identity in missing
        }

        def collect(seconds: float) -> int:
            done, _ = wait(waiting, seconds, FIRST_COMPLETED)
            for future in done:
                self._take(name, waiting.pop(future), future, replies)
            return len(done)

        try:
            with progress(name, len(prompts), known) as advance:
                while waiting:
                    advance(collect(WRITE_EVERY_SECONDS), cost_usd=self._cost())
                    self._kept.write()
                    self._run.stop.check()
        except BaseException:  # what is under way is paid for: keep what comes of it
            self._kept.write(force=True)
            self._client.refused = "the job was stopped"
            self._stopping.set()
            for future in [future for future in waiting if future.cancel()]:
                del waiting[future]
            wait(waiting, _LAST_SECONDS)
            collect(0)
            raise
        finally:
            self._kept.write(force=True)
            pool.shutdown(wait=False)
        return replies

    def _take(
        self,
        name: str,
        identity: str,
        future: Future[Reply],
        replies: dict[str, Reply | LoggedReply],
    ) -> None:
        reply = future.result()
        replies[identity] = self._kept.add(name, identity, reply) if reply.sent else reply

    def outcome(self) -> ReferenceOutcome:
        """The figures of this pass and those before it together."""
        self._run.put(REPLIES_KEY, self._kept.content())
        self._kept.delete_partial()
        errors = Counter(line.error for line in self._lines if line.error)
        failed = errors.total()
        if failed:
            logs.get().warning("answers are missing", reasons=dict(errors.most_common(5)))
        status = "complete" if not failed else "failed" if failed == len(self._lines) else "partial"
        reason = None
        if failed:
            most = errors.most_common(1)[0][0]
            reason = f"{failed} of {len(self._lines)} have no answer: {most}"
        replies = self._kept.replies
        result = ReferenceResult(
            model=self._reference.model,
            provider=sorted({reply.provider for reply in replies if reply.provider}),
            requests=len(replies),
            failed=failed,
            lost=sum(reply.lost for reply in replies),
            tokens=ReferenceTokens(
                prompt=sum(reply.prompt_tokens for reply in replies),
                completion=sum(reply.completion_tokens for reply in replies),
                reasoning=sum(reply.reasoning_tokens for reply in replies),
            ),
            cost_usd=round(self._cost(), 6),
            status=status,
            reason=reason,
        )
        return ReferenceOutcome(
            result=result,
            open=any(line.error and not line.final for line in self._lines),
            stopped_at_usd=self._reference.max_usd if self._client.budget.refused else None,
        )


def _common(reply: Reply | LoggedReply) -> dict[str, object]:
    """What every line says of the reply it was made from."""
    return {
        "error": reply.error,
        "final": reply.final,
        "provider": reply.provider,
        "model": reply.model,
    }


def _skipped(model: str | None, reason: str, *, can_be_asked: bool) -> ReferenceOutcome:
    result = ReferenceResult(
        model=model,
        provider=[],
        requests=0,
        failed=0,
        lost=0,
        tokens=ReferenceTokens(prompt=0, completion=0, reasoning=0),
        cost_usd=0.0,
        status="skipped",
        reason=reason,
    )
    return ReferenceOutcome(result=result, open=can_be_asked)
