"""The judge stage: a remote model chooses between the answers of baseline and tuned model.

It reads the predictions of both, so it needs no device. Like the reference stage it is skipped
without an API key, and requests only what is still missing.
"""

from collections.abc import Sequence

from job.evals.judge import judge_line, make_requests
from job.evals.metrics import BEFORE_AFTER
from job.evals.predictions import DIALOGUE, JUDGE, DialogueLine, Line
from job.evals.remote_model import RemoteModel
from job.pipeline.data_stage import read_examples
from job.pipeline.eval_stage import write_predictions
from job.pipeline.layout import VALIDATION_EXAMPLES
from job.pipeline.reference_stage import RemoteOutcome, ask_remote_model, skipped
from job.pipeline.run import Run
from job.runtime import logs
from job.spec.load import digest
from job.spec.remote import JudgeEval


def run_stage(run: Run) -> RemoteOutcome:
    """Have the pairs of answers judged, and write the judgements."""
    judge = run.spec.evals.judge
    if judge is None:
        return skipped(None, "the spec names no judge", can_retry=False)
    # The id of a reply names its complete request, so replies stay good if the answers change.
    same_judge = digest([judge.model, judge.base_url, judge.max_tokens, judge.reasoning])
    return ask_remote_model(
        run, "judge", judge, same_judge, lambda remote: _judge(run, judge, remote)
    )


def _judge(run: Run, judge: JudgeEval, remote: RemoteModel) -> Sequence[Line]:
    before, after = (run.predictions(model, DIALOGUE, DialogueLine) for model in BEFORE_AFTER)
    pairs = [
        dict(zip(BEFORE_AFTER, pair, strict=True)) for pair in zip(before, after, strict=True)
    ][: judge.examples]
    examples = {example.id: example for example in read_examples(run, VALIDATION_EXAMPLES)}
    requests = [
        make_requests(judge.rubric, examples[pair["baseline"].id].prompt_messages, pair)
        for pair in pairs
    ]
    replies = remote.complete(JUDGE, {i: text for both in requests for i, text in both.items()})
    lines = [
        judge_line(pair, [replies[identity] for identity in both])
        for pair, both in zip(pairs, requests, strict=True)
    ]
    write_predictions(run, "judge", DIALOGUE, lines)
    logs.get().info(
        "answers judged", pairs=len(lines), missing=sum(line.error is not None for line in lines)
    )
    return lines
