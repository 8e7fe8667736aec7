"""The reference stage alone, in this process or in one that a test can kill.

python -m tests.pipeline.reference_runs RUN_URI BASE_URL    (the key is in OPENROUTER_API_KEY)
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from job.pipeline.data_stage import run_stage as stage_data
from job.pipeline.reference_stage import RemoteOutcome, run_stage
from job.pipeline.run import Run
from job.pipeline.stages import stage_digests
from job.runtime import logs
from job.runtime.signals import StopSignal
from job.spec.schema import Spec
from job.storage.base import Store
from job.storage.locations import open_store
from tests.data.staged import MACHINE

QUESTIONS, DIALOGUES, SHOWN = 20, 4, 2
ALL = QUESTIONS + DIALOGUES + SHOWN


def spec_of(base_url: str, output: str = "runs", **reference: Any) -> Spec:
    """Return a spec with 20 questions, 4 dialogues and 2 more prompts for the reference."""
    return Spec.model_validate({
        "name": "t",
        "output": output,
        "model": {"preset": "tiny"},
        "data": {
            "dataset": "samples", "prompt": "{input}", "response": "{output}",
            "train_examples": 20, "validation_examples": 4,
        },
        "evals": {
            "multiple_choice": [{
                "name": "questions", "dataset": "samples", "scoring": "generate",
                "options": ["opa", "opb", "opc", "opd"], "answer": "cop", "id": "id",
                "limit": QUESTIONS,
            }],
            "dialogue": {"max_new_tokens": 48},
            "side_by_side": {"examples": SHOWN},
        },
        "reference": {
            "model": "org/model", "base_url": base_url, "api": "openrouter", "dialogue": True,
            "concurrency": 2, "attempts": 1,
        } | reference,
    })  # fmt: skip


def run_of(store: Store, spec: Spec, work: Path) -> Run:
    """Return a run as a new process has it."""
    run = Run("r", spec, store, work, StopSignal(), MACHINE)
    run.digests = stage_digests(spec)
    return run


def run_data_stage(store: Store, output: str) -> None:
    """Run the data stage."""
    with tempfile.TemporaryDirectory() as work:
        stage_data(run_of(store, spec_of("http://localhost", output), Path(work)))


def run_reference_stage(store: Store, spec: Spec, run: Run | None = None) -> RemoteOutcome:
    """Run the reference stage as a new process would."""
    with tempfile.TemporaryDirectory() as work:
        return run_stage(run or run_of(store, spec, Path(work)))


if __name__ == "__main__":
    logs.configure()
    uri, url = sys.argv[1:]
    run_reference_stage(open_store(uri), spec_of(url))
