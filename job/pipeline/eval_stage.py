"""The baseline and finetuned stages: the same evaluations, without and with the adapter.

The tuned model is loaded from the adapter's file, so the evaluation covers what was saved.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel

from job.data.contamination import find_overlap
from job.data.split_files import iter_examples
from job.evals.batching import BATCHING_VERSION
from job.evals.engine import Engine
from job.evals.local_model import LocalModel
from job.evals.prediction_cache import PredictionCache
from job.evals.predictions import (
    DIALOGUE,
    LOSS,
    SIDE_BY_SIDE,
    Line,
    ModelName,
    format_predictions,
)
from job.evals.tasks import (
    Task,
    TextTask,
    dialogue_lines,
    load_task,
    load_text_task,
    side_by_side_examples,
    side_lines,
    text_lines,
)
from job.pipeline import layout
from job.pipeline.data_stage import read_examples
from job.pipeline.run import Run
from job.pipeline.train_stage import load_trained
from job.runtime import logs
from job.scores import RowCounts
from job.spec.evals import HELD_OUT, HarnessEval


class TaskOutcome(BaseModel):
    """The prompts of an evaluation, and where those of a task are from."""

    truncated: int
    """Prompts truncated at the beginning to `max_prompt_tokens`."""
    revision: str | None = None
    rows: RowCounts | None = None


class EvalOutcome(BaseModel):
    """The outcome of an evaluation stage; the predictions are in their own files."""

    slices: dict[str, TaskOutcome]


def run_stage(run: Run, name: Literal["baseline", "finetuned"]) -> EvalOutcome:
    """Evaluate one model on every evaluation of the spec, and write the predictions."""
    model = run.model()
    weights = (
        model.weights if name == "baseline" else model.merged_weights(*load_trained(run, model))
    )
    evals = run.spec.evals
    engine = Engine(model, evals.batch_size, evals.max_prompt_tokens, run.coordinated_stop.check)
    tasks = [load_task(entry, run.revisions) for entry in evals.multiple_choice]
    held_out = read_examples(run, layout.VALIDATION_EXAMPLES)
    text_tasks = [load_text_task(entry, held_out, run.revisions) for entry in evals.tasks]
    if name == "baseline" and (tasks or text_tasks) and run.processes.is_primary:
        _check_contamination(run, tasks, text_tasks)
    inputs = [run.digests[name], engine.batch_size, BATCHING_VERSION]
    key = layout.partial_predictions(name)
    with PredictionCache(run.store, key, inputs, run.processes.broadcast) as cache:
        local = LocalModel(engine, weights, cache, evals.max_truncated_share)
        outcomes = {task.entry.name: _evaluate_task(run, name, local, task) for task in tasks}
        for entry in evals.harness:
            outcomes[entry.name] = _evaluate_harness(run, name, local, entry)
        for text_task in text_tasks:
            outcomes[text_task.entry.name] = _evaluate_text_task(run, name, local, text_task)
        if evals.dialogue is not None:
            examples = held_out[: evals.dialogue.max_examples]
            replies, truncated = local.answer(DIALOGUE, examples, evals.dialogue.max_new_tokens)
            write_predictions(run, name, DIALOGUE, dialogue_lines(examples, replies))
            outcomes[DIALOGUE] = TaskOutcome(truncated=truncated)
            logs.get().info("dialogue evaluated", examples=len(replies), truncated=truncated)
        losses = local.measure_losses(held_out, evals.max_prompt_tokens)
        write_predictions(run, name, LOSS, losses)
        logs.get().info("held-out loss measured", examples=len(losses))
        section = evals.side_by_side
        examples = side_by_side_examples(held_out, section)
        replies, truncated = local.answer(SIDE_BY_SIDE, examples, section.max_new_tokens)
        write_predictions(run, name, SIDE_BY_SIDE, side_lines(examples, replies))
        outcomes[SIDE_BY_SIDE] = TaskOutcome(truncated=truncated)
    return EvalOutcome(slices=outcomes)


def _evaluate_task(run: Run, name: ModelName, local: LocalModel, task: Task) -> TaskOutcome:
    lines, truncated = local.answer_questions(task)
    write_predictions(run, name, task.entry.name, lines)
    logs.get().info(
        "task evaluated",
        eval=task.entry.name,
        scoring=task.entry.scoring,
        questions=len(lines),
        correct=sum(line.correct for line in lines),
    )
    return TaskOutcome(truncated=truncated, revision=task.revision, rows=task.rows)


def _evaluate_text_task(
    run: Run, name: ModelName, local: LocalModel, task: TextTask
) -> TaskOutcome:
    entry = task.entry
    replies, truncated = local.answer(entry.name, task.examples, entry.max_new_tokens)
    lines = text_lines(task, replies)
    write_predictions(run, name, entry.name, lines)
    score = round(sum(line.score for line in lines) / len(lines), 6)
    logs.get().info(
        "task evaluated", eval=entry.name, metric=entry.metric, examples=len(lines), score=score
    )  # fmt: skip
    return TaskOutcome(truncated=truncated, revision=task.revision, rows=task.rows)


def _evaluate_harness(
    run: Run, name: ModelName, local: LocalModel, entry: HarnessEval
) -> TaskOutcome:
    from job.evals.harness import evaluate

    lines, truncated = evaluate(local, entry, run.spec.evals.max_prompt_tokens)
    write_predictions(run, name, entry.name, lines)
    logs.get().info("task evaluated", eval=entry.name, task=entry.task, samples=len(lines))
    return TaskOutcome(truncated=truncated)


def _check_contamination(run: Run, tasks: Sequence[Task], text_tasks: Sequence[TextTask]) -> None:
    """Write the overlaps of the training examples with the tasks, and warn about them."""
    questions = {
        task.entry.name: {question.id: question.text for question in task.questions}
        for task in tasks
    }
    prompts = {
        task.entry.name: [example.prompt for example in task.examples]
        for task in text_tasks
        if task.entry.dataset != HELD_OUT  # whose prompts the split keeps apart
    }
    overlaps = find_overlap(questions, prompts, iter_examples(run.fetch(layout.TRAIN_EXAMPLES)))
    run.put(layout.CONTAMINATION, overlaps.model_dump_json(indent=2).encode())
    for name, overlap in overlaps.slices.items():
        if overlap.found:
            logs.get().warning(
                "training text contains evaluation questions",
                eval=name,
                contaminated=overlap.found,
                questions=overlap.questions,
                pairs=layout.CONTAMINATION,
                hint="data.checks.drop: [contaminated] drops those examples",
            )
    for name, count in overlaps.trained_prompts.items():
        if count:
            logs.get().warning(
                "prompts are trained on", eval=name, prompts=len(prompts[name]), trained=count
            )


def write_predictions(run: Run, model: ModelName, name: str, lines: Iterable[Line]) -> None:
    """Write a predictions file as an output of the stage."""
    run.put(layout.predictions(model, name), format_predictions(lines))
