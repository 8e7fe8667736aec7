"""Tasks of lm-evaluation-harness score a model as its own `hf` model does, sample by sample."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from job.evals.engine import Engine
from job.evals.local_model import LocalModel
from job.model.load import load_model
from job.spec.evals import HarnessEval
from job.spec.schema import Model
from tests import real_models
from tests.evals.test_prediction_cache import cache_in
from tests.peers import run_peer

pytestmark = pytest.mark.real
MAX_LENGTH = 320
QUESTIONS, TEXTS = 40, 10

TASKS = {
    "letters": """\
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: ["{{opa}}", "{{opb}}", "{{opc}}", "{{opd}}"]
doc_to_target: cop
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "perplexity": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "written": """\
output_type: generate_until
doc_to_text: "{{question}}\\n\\nAnswer in one word."
doc_to_target: "{{opa}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match, ignore_case: true}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks on the samples, as the harness reads them."""
    folder = tmp_path_factory.mktemp("tasks")
    samples = resources.files("job") / "samples"
    questions = (samples / "questions.jsonl").read_text("utf-8").splitlines()[:QUESTIONS]
    dialogues = map(json.loads, (samples / "dialogues.jsonl").read_text("utf-8").splitlines())
    texts = [row["output"] for row in dialogues]
    joined = [json.dumps({"text": "\n".join(texts[i : i + 5])}) for i in range(TEXTS)]
    for name, rows in (("questions", questions), ("texts", joined)):
        (folder / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows), "utf-8")
    for name, text in TASKS.items():
        rows = folder / ("texts.jsonl" if name == "perplexity" else "questions.jsonl")
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {rows}}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: train\n{text}", "utf-8")
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    out = tmp_path_factory.mktemp("theirs") / "out.json"
    names = (*TASKS, "written@chat")
    run_peer(
        "harness_tasks.py", real_models.smollm2(), folder, MAX_LENGTH, out, *names, seconds=900
    )
    return dict(json.loads(out.read_text()))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    model = load_model(Model(preset=str(real_models.smollm2()), dtype="float32"), 0, mesh)
    cache = cache_in(tmp_path_factory.mktemp("store"))
    return LocalModel(Engine(model, 8, 512), model.weights, cache)


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("letters", "acc"), ("letters", "acc_norm"), ("perplexity", "word_perplexity"),
        ("perplexity", "bits_per_byte"), ("written", None), ("written@chat", None),
    ],
)  # fmt: skip
def test_samples_are_those_of_the_harness(
    local: LocalModel, folder: Path, theirs: dict[str, Any], name: str, metric: str | None
) -> None:
    from job.evals.harness import evaluate

    task, _, chat = name.partition("@")
    label = f"{task}-{metric or 'first'}{'-chat' if chat else ''}"
    entry = HarnessEval(
        name=label, task=task, include=str(folder), metric=metric, chat_template=bool(chat)
    )
    lines, truncated = evaluate(local, entry, MAX_LENGTH)
    expected = theirs[name]
    assert [line.id for line in lines] == [f"{task}-{number}" for number, _, _ in expected]
    for line, (_, metrics, answers) in zip(lines, expected, strict=True):
        value = metrics[line.metric]
        value = value[0] / value[1] if isinstance(value, list) else value
        assert line.score == pytest.approx(value, abs=1e-3)
        if task == "letters":
            scores = [float(score) for score, _ in answers]
            assert line.answers == pytest.approx(scores, abs=2e-3)
        if task == "written":
            assert line.answers == answers
    assert len({line.score for line in lines}) > 1 or task == "written"
    assert truncated == 0
