"""The judge stage alone, in this process or in one that a test can kill.

python -m tests.pipeline.judge_runs RUN_URI BASE_URL    (the key is in OPENROUTER_API_KEY)
"""

import sys
import tempfile
from pathlib import Path

from job.pipeline.judge_stage import run_stage
from job.pipeline.reference_stage import RemoteOutcome
from job.pipeline.run import Run
from job.runtime import logs
from job.runtime.signals import StopSignal
from job.spec.schema import Spec
from job.storage.base import Store
from job.storage.locations import open_store
from tests.data.staged import MACHINE


def run_judge_stage(store: Store, base_url: str, **settings: object) -> RemoteOutcome:
    """Run the stage as a new process would."""
    section = {
        "model": "org/judge", "base_url": base_url, "api": "openrouter",
        "attempts": 1, "concurrency": 8,
    }  # fmt: skip
    spec = Spec.model_validate({
        "name": "t", "model": {"preset": "tiny"},
        "data": {"dataset": "samples", "prompt": "{input}", "response": "{output}"},
        "evals": {"judge": section | settings},
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        return run_stage(Run("r", spec, store, Path(work), StopSignal(), MACHINE))


if __name__ == "__main__":
    logs.configure()
    uri, url = sys.argv[1:]
    run_judge_stage(open_store(uri), url, concurrency=2)
