"""The layout of a run's folder: the keys of its files, and the prefixes of its subfolders."""

RESULTS = "results.json"
SPEC = "spec.yaml"
REPORT_HTML = "report.html"
REPORT_MARKDOWN = "report.md"
LOGS = "logs/"
LOG = f"{LOGS}job.jsonl"
STAGES = "stages/"
DATA = "data/"
TRAIN_EXAMPLES = f"{DATA}train.parquet"
VALIDATION_EXAMPLES = f"{DATA}validation.parquet"
DATA_MANIFEST = f"{DATA}manifest.json"
EVALS = "evals/"
CONTAMINATION = f"{EVALS}contamination.json"
"""Evaluation questions that occur in the training text."""
TRAINING = "train/"
"""Prefix of the checkpoints, the history and the TensorBoard events."""

ADAPTER = "adapter/"
PEFT_ADAPTER = "peft/"
"""Folder of the adapter in PEFT's format, inside `ADAPTER`."""
MODEL_CARD = f"{ADAPTER}README.md"
OWNED = (RESULTS, SPEC, "report.", STAGES, DATA, EVALS, TRAINING, ADAPTER, LOGS)
"""Prefixes of everything that a run writes into its folder, and that --fresh deletes from it."""


def stage_record(stage: str) -> str:
    """Return the key of a stage's record."""
    return f"{STAGES}{stage}.json"


def predictions(model: str, name: str) -> str:
    """Return the key of the predictions of a model on an evaluation."""
    return f"{EVALS}{model}/{name}/predictions.jsonl"


def replies(stage: str) -> tuple[str, str]:
    """Return the key of a stage's replies of a remote model, and the prefix of partial ones."""
    return f"{EVALS}{stage}/replies.jsonl", f"{EVALS}{stage}/partial/"


def partial_predictions(model: str) -> str:
    """Return the key of a model's finished batches while its evaluations are not complete."""
    return f"{EVALS}{model}/partial.json"
