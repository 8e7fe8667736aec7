"""The demo on real weights, as a user runs it, with a few examples."""

from pathlib import Path

import pytest

from job.results import Results
from tests.command import job

pytestmark = pytest.mark.real
FEW = (
    "--set", "data.train_examples=8", "--set", "data.validation_examples=2",
    "--set", "train.epochs=1", "--set", "evals.multiple_choice.0.limit=4",
    "--set", "evals.dialogue.examples=2", "--set", "evals.dialogue.max_new_tokens=8",
    "--set", "evals.side_by_side.examples=1", "--set", "evals.side_by_side.max_new_tokens=8",
)  # fmt: skip


def test_the_demo_ends_with_a_verdict_and_its_model_answers(tmp_path: Path) -> None:
    ran = job("run", "demo", "--output", str(tmp_path), "--run-id", "few", *FEW)
    assert ran.code == 0, ran.err
    run = tmp_path / "few"
    results = Results.model_validate_json((run / "results.json").read_bytes())
    assert results.verdict.sentence.startswith("Fine-tuning ")
    assert results.model.parameters.total == 134_515_008
    card = (run / "adapter" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "from_preset" not in card  # KerasHub does not know the preset
    answered = job("generate", str(run), "--prompt", "My knee hurts.", "--max-new-tokens", "8")
    assert answered.code == 0, answered.err
    assert answered.out.strip()
