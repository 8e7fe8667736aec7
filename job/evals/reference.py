"""The reference stage: the same questions and prompts to a larger model far away.

Without a key the stage is skipped and says so. A request that fails leaves a missing answer,
never a wrong one, and never costs the run its other results; the same command run again asks
only what is still open.
"""

import contextvars
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel

from job import logs
from job.evals.chat_api import ChatClient, Reply
from job.evals.parsing import parse_choice
from job.evals.predictions import (
    SIDE_BY_SIDE,
    ChoiceLine,
    SideLine,
    choice_line,
    read_predictions,
    write_predictions,
)
from job.evals.prompts import solved_turns, user_turn
from job.evals.questions import load_slice
from job.evals.reference_key import KEY, missing_key
from job.evals.side_by_side import side_prompts
from job.progress import progress
from job.results import Reference as ReferenceResult
from job.results import ReferenceTokens
from job.run import Run
from job.spec import MultipleChoice, Reference


class ReferenceOutcome(BaseModel):
    """What the reference stage found out."""

    result: ReferenceResult
    open: bool
    """Some questions have no answer that asking again could give."""


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
    asking.side_by_side()
    return asking.outcome()


class _Asking:
    """One pass over everything there is to ask, and the sums over its replies."""

    def __init__(self, run: Run, reference: Reference) -> None:
        self._run = run
        self._reference = reference
        self._client = ChatClient(
            reference.base_url,
            os.environ[KEY].strip(),
            reference.model,
            reference.max_tokens,
            reference.timeout_seconds,
            reference.attempts,
        )
        before = run.previous.outcome if run.previous else None
        self._before = ReferenceOutcome.model_validate(before).result if before else None
        self._replies: list[Reply] = []
        self._lines: list[ChoiceLine | SideLine] = []

    def multiple_choice(self, entry: MultipleChoice) -> None:
        """Ask the questions of a slice and keep the lines."""
        found = load_slice(entry, self._run.revisions)
        questions, history = found.questions, solved_turns(entry, found.shots)
        known = self._known(entry.name, ChoiceLine)
        asked = [question for question in questions if question.id not in known]
        turns = [user_turn(entry, question) for question in asked]
        made = {
            question.id: choice_line(
                question,
                parse_choice(reply.answer, question.options) if reply.answer else None,
                answer=reply.answer,
                error=reply.error,
                final=reply.final,
            )
            for question, reply in zip(
                asked,
                self._ask_all(
                    lambda turn: self._client.ask(turn, None, history), turns, entry.name
                ),
                strict=True,
            )
        }
        lines = [known.get(question.id) or made[question.id] for question in questions]
        self._keep(entry.name, lines)

    def side_by_side(self) -> None:
        """Ask the prompts that every model is shown."""
        prompts = side_prompts(self._run)
        known = self._known(SIDE_BY_SIDE, SideLine)
        asked = [prompt for prompt in prompts if prompt.id not in known]
        replies = self._ask_all(
            lambda shown: self._client.ask(shown.prompt, shown.system, shown.history),
            asked,
            "side by side",
        )
        made = {
            p.id: SideLine(
                id=p.id,
                prompt=p.prompt,
                expected=p.expected,
                answer=r.answer,
                error=r.error,
                final=r.final,
            )
            for p, r in zip(asked, replies, strict=True)
        }
        self._keep(SIDE_BY_SIDE, [known.get(prompt.id) or made[prompt.id] for prompt in prompts])

    def _known[L: ChoiceLine | SideLine](self, name: str, kind: type[L]) -> Mapping[str, L]:
        """By id, what an earlier pass over the same inputs settled."""
        if self._before is None:
            return {}
        lines = read_predictions(self._run, "reference", name, kind)
        return {line.id: line for line in lines if line.error is None or line.final}

    def _keep(self, name: str, lines: Sequence[ChoiceLine | SideLine]) -> None:
        write_predictions(self._run, "reference", name, lines)
        self._lines += lines

    def _ask_all(
        self, ask: Callable[[Any], Reply], items: Sequence[Any], label: str
    ) -> list[Reply]:
        # Each worker logs under this run and stage: a thread has no context of its own.
        context = contextvars.copy_context()
        replies = []
        with (
            ThreadPoolExecutor(self._reference.concurrency) as pool,
            progress(label, len(items)) as advance,
        ):
            try:
                for reply in pool.map(lambda item: context.copy().run(ask, item), items):
                    self._replies.append(reply)
                    replies.append(reply)
                    advance(1, cost_usd=sum(reply.cost_usd for reply in self._replies))
                    self._run.stop.check()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return replies

    def outcome(self) -> ReferenceOutcome:
        """The figures of this pass and those before it together."""
        before = self._before
        errors = Counter(line.error for line in self._lines if line.error)
        failed = errors.total()
        if failed:
            logs.get().warning("answers are missing", reasons=dict(errors.most_common(5)))
        status = "complete" if not failed else "failed" if failed == len(self._lines) else "partial"
        reason = None
        if failed:
            most = errors.most_common(1)[0][0]
            reason = f"{failed} of {len(self._lines)} have no answer: {most}"
        providers = {reply.provider for reply in self._replies if reply.provider}
        result = ReferenceResult(
            model=self._reference.model,
            provider=sorted(providers | set(before.provider if before else ())),
            requests=sum(reply.sent for reply in self._replies)
            + (before.requests if before else 0),
            failed=failed,
            tokens=ReferenceTokens(
                prompt=sum(r.prompt_tokens for r in self._replies)
                + (before.tokens.prompt if before else 0),
                completion=sum(r.completion_tokens for r in self._replies)
                + (before.tokens.completion if before else 0),
            ),
            cost_usd=round(
                sum(r.cost_usd for r in self._replies) + (before.cost_usd if before else 0), 6
            ),
            status=status,
            reason=reason,
        )
        return ReferenceOutcome(
            result=result, open=any(line.error and not line.final for line in self._lines)
        )


def _skipped(model: str | None, reason: str, *, can_be_asked: bool) -> ReferenceOutcome:
    result = ReferenceResult(
        model=model,
        provider=[],
        requests=0,
        failed=0,
        tokens=ReferenceTokens(prompt=0, completion=0),
        cost_usd=0.0,
        status="skipped",
        reason=reason,
    )
    return ReferenceOutcome(result=result, open=can_be_asked)
