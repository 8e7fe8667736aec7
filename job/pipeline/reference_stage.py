"""The reference stage: the same questions and prompts, answered by a larger remote model.

Without an API key the stage is skipped and reports it. A failed request leaves a missing answer,
never a wrong one, and does not stop the run. Replies are saved as they arrive, so the same command
requests only what is still missing.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence

from pydantic import BaseModel

from job.data.examples import Example
from job.evals.api_client import API_KEY_VARIABLE, ChatClient, missing_key
from job.evals.budget import Budget
from job.evals.predictions import DIALOGUE, SIDE_BY_SIDE, Line, Reply
from job.evals.remote_model import RemoteModel
from job.evals.reply_log import ReplyLog
from job.evals.tasks import (
    choice_lines,
    dialogue_lines,
    load_task,
    load_text_task,
    question_messages,
    side_by_side_examples,
    side_lines,
    text_lines,
)
from job.pipeline import layout
from job.pipeline.data_stage import read_examples
from job.pipeline.eval_stage import write_predictions
from job.pipeline.layout import VALIDATION_EXAMPLES
from job.pipeline.run import Run
from job.runtime import logs
from job.scores import ReferenceResult, ReferenceTokens
from job.spec.remote import Endpoint, Reference


class RemoteOutcome(BaseModel):
    """The outcome of a stage that asks a remote model."""

    result: ReferenceResult
    open: bool
    """Whether another attempt could give some of the missing answers."""
    stopped_at_usd: float | None = None
    """The budget, if it ran out."""


def run_stage(run: Run) -> RemoteOutcome:
    """Evaluate the reference model on what the spec names, and write the predictions."""
    reference = run.spec.reference
    if reference is None:
        return skipped(None, "the spec names no reference model", can_retry=False)
    return ask_remote_model(
        run,
        "reference",
        reference,
        run.digests["reference"],
        lambda remote: _evaluate(run, reference, remote),
    )


def ask_remote_model(
    run: Run,
    stage: str,
    endpoint: Endpoint,
    inputs_digest: str,
    evaluate: Callable[[RemoteModel], Sequence[Line]],
) -> RemoteOutcome:
    """Evaluate with a remote model; skipped without an API key.

    Args:
        run: the run.
        stage: name of the stage, under which the replies are saved.
        endpoint: the model.
        inputs_digest: of what the saved replies depend on beside their ids.
        evaluate: writes the predictions, and returns the lines of all evaluations.
    """
    missing = missing_key(endpoint)
    if missing:
        logs.get().warning(missing)
        return skipped(endpoint.model, f"{API_KEY_VARIABLE} is not set", can_retry=True)
    replies, partial = layout.replies(stage)
    log = ReplyLog(run.store, replies, partial, inputs_digest)
    costs = [reply.cost_usd for reply in log.replies if reply.answer is not None]
    budget = Budget(
        endpoint.max_usd, log.cost_usd, max(costs, default=None), f"{endpoint.path}.max_usd"
    )
    client = ChatClient(endpoint, os.environ[API_KEY_VARIABLE].strip(), budget)
    lines = evaluate(RemoteModel(client, log, endpoint.concurrency, run.stop.check))
    run.put(replies, log.content())
    log.delete_partial()
    return RemoteOutcome(
        result=_result(endpoint.model, log, lines),
        open=any(line.error and not line.final for line in lines),
        stopped_at_usd=endpoint.max_usd if client.budget.exhausted else None,
    )


def _evaluate(run: Run, reference: Reference, remote: RemoteModel) -> list[Line]:
    """Evaluate and write predictions; return the lines of all evaluations."""
    evaluated: list[Line] = []

    def write(name: str, lines: Sequence[Line]) -> None:
        write_predictions(run, "reference", name, lines)
        evaluated.extend(lines)

    def ask(name: str, examples: Sequence[Example], limit: int | None = None) -> list[Reply]:
        # A model that reasons needs its own limit: reasoning counts.
        limit = limit if reference.reasoning == "none" else None
        prompts = {example.id: example.prompt_messages for example in examples}
        replies = remote.complete(name, prompts, limit)
        return [replies[example.id] for example in examples]

    for entry in run.spec.reference_tasks:
        task = load_task(entry, run.revisions)
        ids = [question.id for question in task.questions]
        found = remote.complete(entry.name, dict(zip(ids, question_messages(task), strict=True)))
        write(entry.name, choice_lines(task, [found[identity] for identity in ids]))
    held_out = read_examples(run, VALIDATION_EXAMPLES)
    for text_entry in run.spec.reference_text_tasks:
        text_task = load_text_task(text_entry, held_out, run.revisions)
        replies = ask(text_entry.name, text_task.examples, text_entry.max_new_tokens)
        write(text_entry.name, text_lines(text_task, replies))
    dialogue = run.spec.evals.dialogue
    if reference.dialogue and dialogue is not None:
        examples = held_out[: dialogue.max_examples]
        replies = ask(DIALOGUE, examples, dialogue.max_new_tokens)
        write(DIALOGUE, dialogue_lines(examples, replies))
    examples = side_by_side_examples(held_out, run.spec.evals.side_by_side)
    write(SIDE_BY_SIDE, side_lines(examples, ask(SIDE_BY_SIDE, examples)))
    return evaluated


def _result(model: str, log: ReplyLog, lines: Sequence[Line]) -> ReferenceResult:
    """Return the totals over all starts of the stage."""
    errors = Counter(line.error for line in lines if line.error)
    failed = errors.total()
    reason = None
    if failed:
        logs.get().warning("answers are missing", reasons=dict(errors.most_common(5)))
        reason = f"{failed} of {len(lines)} have no answer: {errors.most_common(1)[0][0]}"
    return ReferenceResult(
        model=model,
        provider=sorted({reply.provider for reply in log.replies if reply.provider}),
        requests=len(log.replies),
        failed=failed,
        lost=sum(reply.lost for reply in log.replies),
        tokens=ReferenceTokens(
            prompt=sum(reply.prompt_tokens for reply in log.replies),
            completion=sum(reply.completion_tokens for reply in log.replies),
            reasoning=sum(reply.reasoning_tokens for reply in log.replies),
        ),
        cost_usd=round(log.cost_usd, 6),
        status="complete" if not failed else "failed" if failed == len(lines) else "partial",
        reason=reason,
    )


def skipped(model: str | None, reason: str, *, can_retry: bool) -> RemoteOutcome:
    """Return the outcome of a stage that was not run."""
    result = ReferenceResult(model=model, status="skipped", reason=reason)
    return RemoteOutcome(result=result, open=can_retry)
