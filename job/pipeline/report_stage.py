"""The report stage: assemble the results from the files of the run, and write the report pages."""

import json
from collections.abc import Mapping

from job.data.contamination import Contamination
from job.evals.judge import summarize_judge
from job.evals.metrics import (
    BEFORE_AFTER,
    family_and_margin,
    score_dialogues,
    summarize_choices,
    summarize_loss,
    summarize_style,
    trivial_baselines,
)
from job.evals.paired import compare_means, decide_findings
from job.evals.predictions import (
    DIALOGUE,
    LOSS,
    SIDE_BY_SIDE,
    ChoiceLine,
    DialogueLine,
    HarnessLine,
    JudgeLine,
    Line,
    LossLine,
    SideLine,
    TextLine,
    answered,
    scores_by_id,
)
from job.evals.statistics import Bootstrap
from job.evals.task_scores import summarize_harness, summarize_text_task
from job.evals.text_metrics import make_metric
from job.machine.accelerators import find_accelerator
from job.pipeline import layout
from job.pipeline.eval_stage import EvalOutcome, TaskOutcome
from job.pipeline.reference_stage import RemoteOutcome
from job.pipeline.run import Preflight, Run, now
from job.pipeline.train_stage import TrainOutcome
from job.report.model_card import render_card
from job.report.render import Flip, render_html, render_markdown
from job.report.verdict import decide
from job.results import Cost, DataInfo, Results, RunInfo, Training
from job.scores import (
    Dialogue,
    Evaluation,
    JudgeResult,
    MeanComparison,
    MultipleChoiceResult,
    ReferenceResult,
    SideBySide,
    TextTaskResult,
)
from job.spec.evals import TextEval
from job.spec.load import digest
from job.spec.schema import MultipleChoiceEval
from job.train.metrics import HISTORY


def run_stage(run: Run) -> Results:
    """Compute the results from the saved predictions, and write the report and the model card."""
    reference = run.outcome("reference", RemoteOutcome).result
    evaluation = decide_findings(_evaluation(run))
    trained = run.outcome("train", TrainOutcome)
    results = Results(
        verdict=decide(evaluation),
        run=_run_info(run, run.outcome("preflight", Preflight)),
        environment=run.records["train"].environment,
        model=trained.model,
        data=run.outcome("data", DataInfo),
        training=trained.training,
        evaluation=evaluation,
        reference=reference,
        artifacts=[artifact for record in run.records.values() for artifact in record.outputs],
        cost=_cost(run, trained.training, reference),
    )
    lines = (run.read(layout.TRAINING + HISTORY) or b"").splitlines()
    history = [json.loads(line) for line in lines]
    flips = _flips(run)
    run.put(layout.REPORT_HTML, render_html(results, history, flips).encode())
    run.put(layout.REPORT_MARKDOWN, render_markdown(results, history, flips).encode())
    run.put(layout.MODEL_CARD, render_card(results).encode())
    return results


def _run_info(run: Run, preflight: Preflight) -> RunInfo:
    spec = run.spec.model_dump(mode="json")
    seconds = {name: record.seconds for name, record in run.records.items()}
    return RunInfo(
        id=run.id,
        name=run.spec.name,
        status="complete",
        started=preflight.first_started,
        finished=now(),
        seconds=round(sum(seconds.values()), 3),
        stage_seconds=seconds,
        spec_digest=digest(spec),
        spec=spec,
        resumes=preflight.resumes,
    )


def _evaluation(run: Run) -> Evaluation:
    evals, bootstrap = run.spec.evals, _bootstrap(run)
    sources = run.outcome("baseline", EvalOutcome).slices
    return Evaluation(
        multiple_choice=[
            _multiple_choice(run, entry, sources[entry.name]) for entry in evals.multiple_choice
        ],
        harness=[
            summarize_harness(
                entry,
                _predictions(run, entry.name, HarnessLine),
                sources[entry.name].truncated,
                bootstrap,
            )
            for entry in evals.harness
        ],
        tasks=[_text_task(run, entry, sources[entry.name]) for entry in evals.tasks],
        dialogue=_dialogue(run, sources),
        judge=_judge(run),
        loss=summarize_loss(_predictions(run, LOSS, LossLine), bootstrap),
        side_by_side=_side_by_side(run),
        side_by_side_truncated_prompts=sources[SIDE_BY_SIDE].truncated,
    )


def _predictions[L: Line](run: Run, name: str, kind: type[L]) -> dict[str, list[L]]:
    """Read the predictions of an evaluation by model; the reference's where it has some."""
    models: list[str] = [*BEFORE_AFTER]
    if name in _reference_evals(run):
        models.append("reference")
    return {model: run.predictions(model, name, kind) for model in models}


def _reference_evals(run: Run) -> list[str]:
    """Return the names of the evaluations; other predictions may be of an earlier reference."""
    spec = run.spec
    if run.outcome("reference", RemoteOutcome).result.status == "skipped":
        return []
    names = [entry.name for entry in spec.reference_tasks]
    names += [entry.name for entry in spec.reference_text_tasks]
    names += [DIALOGUE] if spec.reference and spec.reference.dialogue else []
    return [*names, SIDE_BY_SIDE]


def _bootstrap(run: Run) -> Bootstrap:
    return Bootstrap(run.spec.evals.bootstrap_samples, run.spec.seed)


def _multiple_choice(
    run: Run, entry: MultipleChoiceEval, source: TaskOutcome
) -> MultipleChoiceResult:
    models = _predictions(run, entry.name, ChoiceLine)
    overlap = _contamination(run).slices.get(entry.name)
    return summarize_choices(
        entry,
        models,
        revision=source.revision,
        rows=source.rows,
        truncated_prompts=source.truncated,
        in_training_text=overlap.found if overlap else None,
    )


def _contamination(run: Run) -> Contamination:
    """Return what was found of the tasks in the training text; empty if nothing was searched."""
    content = run.read(layout.CONTAMINATION)
    if content is None:
        return Contamination(words=0, examples=0, slices={}, pairs=[])
    return Contamination.model_validate_json(content)


def _text_task(run: Run, entry: TextEval, source: TaskOutcome) -> TextTaskResult:
    models = _predictions(run, entry.name, TextLine)
    labels = entry.labels or sorted({line.target for line in models["baseline"] if line.target})
    assert source.rows is not None
    return summarize_text_task(
        entry,
        models,
        make_metric(entry, labels),
        _bootstrap(run),
        revision=source.revision,
        rows=source.rows,
        truncated=source.truncated,
        trained_prompts=_contamination(run).trained_prompts.get(entry.name, 0),
    )


def _judge(run: Run) -> JudgeResult | None:
    judge = run.spec.evals.judge
    if judge is None:
        return None
    service = run.outcome("judge", RemoteOutcome).result
    is_skipped = service.status == "skipped"  # its file may be of an earlier judge
    lines = [] if is_skipped else run.predictions("judge", DIALOGUE, JudgeLine)
    return summarize_judge(judge.rubric, lines, service, _bootstrap(run))


def _dialogue(run: Run, sources: Mapping[str, TaskOutcome]) -> Dialogue | None:
    section = run.spec.evals.dialogue
    if section is None:
        return None
    bootstrap = _bootstrap(run)
    models = _predictions(run, DIALOGUE, DialogueLine)
    if not answered(models.get("reference", [])):
        models.pop("reference", None)
    before, scores = models["baseline"], {name: scores_by_id(each) for name, each in models.items()}

    def compare(a: str, b: str) -> MeanComparison | None:
        family, _ = family_and_margin((a, b))
        return compare_means(
            MeanComparison, (a, b), scores[a], scores.get(b, {}), bootstrap, family
        )

    comparison = compare("baseline", "finetuned")
    assert comparison is not None  # local models answer everything
    trivial = trivial_baselines(before, bootstrap)
    return Dialogue(
        examples=len(before),
        truncated_prompts=sources[DIALOGUE].truncated,
        max_new_tokens=section.max_new_tokens,
        models={name: score_dialogues(lines, bootstrap) for name, lines in models.items()},
        markers=summarize_style(section.markers, models),
        nulls=trivial["rougeL"],
        chrf_nulls=trivial["chrf"],
        comparison=comparison,
        reference_comparison=compare("finetuned", "reference"),
    )


def _side_by_side(run: Run) -> list[SideBySide]:
    models = _predictions(run, SIDE_BY_SIDE, SideLine)
    return [
        SideBySide(
            id=line.id,
            prompt=line.prompt,
            expected=line.expected,
            answers={name: _shown_answer(lines[number]) for name, lines in models.items()},
        )
        for number, line in enumerate(models["baseline"])
    ]


def _shown_answer(line: SideLine) -> str:
    reason = line.error or ("cut in its thoughts" if line.thoughts else None)
    return line.answer or (f"[no answer: {reason}]" if reason else "")


def _flips(run: Run) -> list[Flip]:
    """Return the questions that exactly one of the baseline and the tuned model got right."""
    flips = []
    for entry in run.spec.evals.multiple_choice:
        before = run.predictions("baseline", entry.name, ChoiceLine)
        after = answered(run.predictions("finetuned", entry.name, ChoiceLine))
        flips += [
            Flip(entry.name, line, after[line.id])
            for line in before
            if line.id in after and line.correct != after[line.id].correct
        ]
    return flips


def _cost(run: Run, training: Training, reference: ReferenceResult) -> Cost:
    """Return the chip hours of all stages and their cost at on-demand list prices.

    A resumed training counts the time of all its parts, as its checkpoints add it up. Dollars
    include the remote models; they are None if the price of an accelerator is not known.
    """
    judge = run.outcome("judge", RemoteOutcome).result
    hours, usd = 0.0, reference.cost_usd + judge.cost_usd
    has_prices = True
    for name, record in run.records.items():
        machine = record.environment
        if machine.platform == "cpu":
            continue
        seconds = max(record.seconds, training.seconds.total if name == "train" else 0.0)
        chip_hours = machine.devices * seconds / 3600
        accelerator = find_accelerator(machine.device_kind)
        price = accelerator.price.on_demand if accelerator and accelerator.price else None
        has_prices = has_prices and price is not None
        hours, usd = hours + chip_hours, usd + chip_hours * (price or 0.0)
    return Cost(chip_hours=round(hours, 4), usd=round(usd, 6) if has_prices else None)
