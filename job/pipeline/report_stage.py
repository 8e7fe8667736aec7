"""The report stage: from the files of the run to its results, and to pages that show them."""

import json
from datetime import UTC, datetime

from job.data import contamination
from job.data.contamination import Contamination
from job.evals.metrics import (
    compare_dialogues,
    score_dialogues,
    summarize_choices,
    summarize_style,
    trivial_baselines,
)
from job.evals.predictions import (
    DIALOGUE,
    SIDE_BY_SIDE,
    ChoiceLine,
    DialogueLine,
    SideLine,
    answered,
    read_predictions,
)
from job.evals.statistics import Bootstrap, apply_holm
from job.machine import accelerators
from job.pipeline.eval_stage import EvalOutcome
from job.pipeline.reference_stage import ReferenceOutcome
from job.pipeline.run import Preflight, Run
from job.pipeline.train_stage import TrainOutcome
from job.report import model_card
from job.report.page import Flip, render_html, render_markdown
from job.report.verdict import decide
from job.results import (
    Cost,
    DataInfo,
    Dialogue,
    Evaluation,
    MultipleChoiceResult,
    ReferenceResult,
    Results,
    RunInfo,
    SideBySide,
    Training,
)
from job.spec.fields import LETTERS
from job.spec.load import digest
from job.train.trainer import HISTORY

HTML = "report.html"


MARKDOWN = "report.md"


def run_stage(run: Run) -> Results:
    """Put the results together from the predictions on file, and write the report."""
    reference = run.outcome("reference", ReferenceOutcome).result
    evaluation = apply_holm(_evaluation(run, reference))
    trained = run.outcome("train", TrainOutcome)
    preflight = run.outcome("preflight", Preflight)
    results = Results(
        verdict=decide(evaluation),
        run=_run_info(run, preflight),
        environment=run.records["train"].environment,
        model=trained.model,
        data=run.outcome("data", DataInfo),
        training=trained.training,
        evaluation=evaluation,
        reference=reference,
        artifacts=[item for marker in run.records.values() for item in marker.outputs],
        cost=_cost(run, trained.training, reference),
    )
    history = [json.loads(line) for line in (run.store.read(HISTORY) or b"").splitlines()]
    flips = _flips(run)
    run.put(HTML, render_html(results, history, flips).encode())
    run.put(MARKDOWN, render_markdown(results, history, flips).encode())
    run.put(model_card.KEY, model_card.render_card(results).encode())
    return results


def _run_info(run: Run, preflight: Preflight) -> RunInfo:
    spec = run.spec.model_dump(mode="json")
    seconds = {name: marker.seconds for name, marker in run.records.items()}
    return RunInfo(
        id=run.id,
        name=run.spec.name,
        status="complete",
        started=preflight.first_started,
        finished=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        seconds=round(sum(seconds.values()), 3),
        stage_seconds=seconds,
        spec_digest=digest(spec),
        spec=spec,
        resumes=preflight.resumes,
    )


def _evaluation(run: Run, reference: ReferenceResult) -> Evaluation:
    return Evaluation(
        multiple_choice=[
            _slice(run, number, reference) for number in range(len(run.spec.evals.multiple_choice))
        ],
        dialogue=_dialogue(run, reference),
        side_by_side=_side_by_side(run, reference),
    )


def _slice(run: Run, number: int, reference: ReferenceResult) -> MultipleChoiceResult:
    entry = run.spec.evals.multiple_choice[number]
    models = {
        "baseline": read_predictions(run.store, "baseline", entry.name, ChoiceLine),
        "finetuned": read_predictions(run.store, "finetuned", entry.name, ChoiceLine),
    }
    if reference.status != "skipped" and entry in run.spec.reference_slices:
        models["reference"] = read_predictions(run.store, "reference", entry.name, ChoiceLine)
    revision = run.outcome("baseline", EvalOutcome).slices[entry.name].revision
    return summarize_choices(
        entry, models, _bootstrap(run), revision, _in_training_text(run, entry.name)
    )


def _bootstrap(run: Run) -> Bootstrap:
    return Bootstrap(run.spec.evals.bootstrap_samples, run.spec.seed)


def _in_training_text(run: Run, name: str) -> int | None:
    content = run.store.read(contamination.KEY)
    if content is None:
        return None
    overlap = Contamination.model_validate_json(content).slices.get(name)
    return overlap.found if overlap else None


def _dialogue(run: Run, reference: ReferenceResult) -> Dialogue | None:
    wanted = run.spec.evals.dialogue
    if wanted is None:
        return None
    bootstrap = _bootstrap(run)
    before = read_predictions(run.store, "baseline", DIALOGUE, DialogueLine)
    after = read_predictions(run.store, "finetuned", DIALOGUE, DialogueLine)
    models = {"baseline": before, "finetuned": after}
    remote = read_predictions(run.store, "reference", DIALOGUE, DialogueLine)
    asked = run.spec.reference is not None and run.spec.reference.dialogue
    if asked and reference.status != "skipped" and answered(remote):
        models["reference"] = remote
    comparison = compare_dialogues(("baseline", "finetuned"), before, after, bootstrap)
    assert comparison is not None  # the job's own models answer everything
    return Dialogue(
        examples=len(before),
        max_new_tokens=wanted.max_new_tokens,
        models={name: score_dialogues(lines, bootstrap) for name, lines in models.items()},
        markers=summarize_style(wanted.markers, models, bootstrap),
        nulls=trivial_baselines(before, bootstrap),
        comparison=comparison,
        reference_comparison=compare_dialogues(
            ("finetuned", "reference"), after, models.get("reference", []), bootstrap
        ),
    )


def _side_by_side(run: Run, reference: ReferenceResult) -> list[SideBySide]:
    sources = {
        "baseline": read_predictions(run.store, "baseline", SIDE_BY_SIDE, SideLine),
        "finetuned": read_predictions(run.store, "finetuned", SIDE_BY_SIDE, SideLine),
    }
    if reference.status != "skipped":
        sources["reference"] = read_predictions(run.store, "reference", SIDE_BY_SIDE, SideLine)
    return [
        SideBySide(
            id=line.id,
            prompt=line.prompt,
            expected=line.expected,
            answers={
                name: lines[number].answer or f"[no answer: {lines[number].error}]"
                if lines[number].error
                else lines[number].answer or ""
                for name, lines in sources.items()
            },
        )
        for number, line in enumerate(sources["baseline"])
    ]


def _flips(run: Run) -> list[Flip]:
    """The questions that one model got right and the other wrong."""
    found = []
    for entry in run.spec.evals.multiple_choice:
        before = read_predictions(run.store, "baseline", entry.name, ChoiceLine)
        after = answered(read_predictions(run.store, "finetuned", entry.name, ChoiceLine))
        found += [
            Flip(entry.name, a.id, with_options(a), a.gold, a.choice, b.choice, gained=b.correct)
            for a in before
            if (b := after.get(a.id)) and a.correct != b.correct
        ]
    return found


def with_options(line: ChoiceLine) -> str:
    """A question and its lettered options, a line each."""
    options = zip(LETTERS, line.options, strict=False)
    return "\n".join([line.question, *(f"{letter}. {option}" for letter, option in options)])


def _cost(run: Run, training: Training, reference: ReferenceResult) -> Cost:
    """Chip hours of all stages, each on the machine it ran on, and dollars at list prices.

    Training that was resumed took what its checkpoints add up to, not only its last part.
    Dollars are those of chips on demand and of the reference; null where a price is not known.
    """
    hours, usd = 0.0, reference.cost_usd
    known = True
    for name, marker in run.records.items():
        machine = marker.environment
        if machine.platform == "cpu":
            continue
        seconds = max(marker.seconds, training.seconds.total if name == "train" else 0.0)
        spent = machine.devices * seconds / 3600
        found = accelerators.find_accelerator(machine.device_kind)
        price = found.price.on_demand if found is not None and found.price is not None else None
        known = known and price is not None
        hours, usd = hours + spent, usd + spent * (price or 0.0)
    return Cost(chip_hours=round(hours, 4), usd=round(usd, 6) if known else None)
