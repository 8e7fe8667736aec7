"""The reference stage: the same questions and prompts to a larger model far away.

Without a key the stage is skipped, says so, and is tried again by the next run that has one.
A request that fails leaves a missing answer, never a wrong one.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from job import logs
from job.errors import StageError
from job.evals.chat_api import ChatClient, Reply
from job.evals.parsing import parse_choice
from job.evals.predictions import SIDE_BY_SIDE, SideLine, choice_line, write_predictions
from job.evals.questions import load_slice, user_turn
from job.evals.reference_key import KEY, missing_key
from job.evals.side_by_side import side_prompts
from job.progress import progress
from job.results import Reference as ReferenceResult
from job.results import ReferenceTokens
from job.run import Run
from job.spec import MultipleChoice, Reference, Spec


class _Totals:
    """Sums over all replies."""

    def __init__(self) -> None:
        self.requests = self.failed = self.prompt = self.completion = 0
        self.cost = 0.0
        self.providers: set[str] = set()

    def add(self, reply: Reply) -> None:
        self.requests += 1
        self.failed += reply.answer is None
        self.prompt += reply.prompt_tokens
        self.completion += reply.completion_tokens
        self.cost += reply.cost_usd
        if reply.provider:
            self.providers.add(reply.provider)


def asked_slices(spec: Spec) -> list[MultipleChoice]:
    """The slices that the reference model is asked."""
    if spec.reference is None:
        return []
    if spec.reference.evals is None:
        return [item for item in spec.evals.multiple_choice if item.scoring == "generate"]
    return [item for item in spec.evals.multiple_choice if item.name in spec.reference.evals]


def run_stage(run: Run) -> ReferenceResult:
    """Ask the reference model what the others were asked.

    Raises:
        EnvironmentProblem: the key is refused.
        StageError: no request at all was answered.
    """
    reference = run.spec.reference
    if reference is None:
        return _skipped(None, "the spec names no reference model")
    missing = missing_key(reference)
    if missing:
        logs.get().warning(missing)
        return _skipped(reference.model, f"{KEY} is not set")
    client = ChatClient(
        reference.base_url,
        os.environ[KEY].strip(),
        reference.model,
        reference.max_tokens,
        reference.timeout_seconds,
        reference.attempts,
    )
    totals = _Totals()
    for entry in asked_slices(run.spec):
        questions = load_slice(entry).questions
        turns = [user_turn(entry, question) for question in questions]
        replies = _ask_all(client.ask, turns, reference.concurrency, entry.name, totals)
        lines = [
            choice_line(
                question,
                parse_choice(reply.answer, question.options) if reply.answer else None,
                answer=reply.answer,
                error=reply.error,
            )
            for question, reply in zip(questions, replies, strict=True)
        ]
        write_predictions(run, "reference", entry.name, lines)
    prompts = side_prompts(run)
    replies = _ask_all(
        lambda shown: client.ask(shown.prompt, shown.system),
        prompts,
        reference.concurrency,
        "side by side",
        totals,
    )
    sides = [
        SideLine(id=p.id, prompt=p.prompt, expected=p.expected, answer=r.answer, error=r.error)
        for p, r in zip(prompts, replies, strict=True)
    ]
    write_predictions(run, "reference", SIDE_BY_SIDE, sides)
    return _outcome(reference, totals)


def _ask_all[Asked](
    ask: Callable[[Asked], Reply],
    items: Sequence[Asked],
    concurrency: int,
    label: str,
    totals: _Totals,
) -> list[Reply]:
    replies = []
    with ThreadPoolExecutor(concurrency) as pool, progress(label, len(items)) as advance:
        try:
            for reply in pool.map(ask, items):
                totals.add(reply)
                replies.append(reply)
                advance(1, cost_usd=totals.cost)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return replies


def _outcome(reference: Reference, totals: _Totals) -> ReferenceResult:
    if totals.requests and totals.failed == totals.requests:
        raise StageError(
            f"reference: none of {totals.requests} requests to {reference.base_url} was answered; "
            "see the log for the reasons"
        )
    reason = f"{totals.failed} of {totals.requests} requests failed" if totals.failed else None
    if reason:
        logs.get().warning(reason)
    return ReferenceResult(
        model=reference.model,
        provider=sorted(totals.providers),
        requests=totals.requests,
        failed=totals.failed,
        tokens=ReferenceTokens(prompt=totals.prompt, completion=totals.completion),
        cost_usd=round(totals.cost, 6),
        status="partial" if totals.failed else "complete",
        reason=reason,
    )


def _skipped(model: str | None, reason: str) -> ReferenceResult:
    return ReferenceResult(
        model=model,
        provider=[],
        requests=0,
        failed=0,
        tokens=ReferenceTokens(prompt=0, completion=0),
        cost_usd=0.0,
        status="skipped",
        reason=reason,
    )
