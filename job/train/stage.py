"""The train stage: examples to rows, rows to an adapter, the adapter to its file."""

from pydantic import BaseModel

from job import logs
from job.data.packing import PackedRows, Tokenized, make_rows, tokenize
from job.data.stage import TRAIN, VALIDATION, read_examples
from job.errors import UsageError
from job.model.adapter import save_adapter
from job.model.language_model import LanguageModel
from job.results import (
    Accuracies,
    Losses,
    ModelInfo,
    ParameterCounts,
    Seconds,
    TokenCounts,
    Training,
)
from job.run import Run
from job.train.loop import HISTORY, Trained, Trainer

ADAPTER = "adapter/adapter.lora.h5"


class TrainOutcome(BaseModel):
    """What the train stage found out."""

    model: ModelInfo
    training: Training
    fill: float
    """Share of the token slots of the rows that hold a token."""


def run_stage(run: Run) -> TrainOutcome:
    """Fine-tune the model of the spec and write the adapter and the history.

    Raises:
        UsageError: no example fits the spec's lengths.
        Interrupted, StageError: see `Trainer.run`.
    """
    model = run.model()
    packed = run.spec.train.packing and model.can_pack
    if run.spec.train.packing and not packed:
        logs.get().warning(
            "packing is not known to be sound for this family of models; one example a row instead",
            family=model.family,
        )
    tokenized, rows = _rows(run, model, TRAIN, packed=packed)
    _, validation = _rows(run, model, VALIDATION, packed=packed)
    logs.get().info(
        "examples are tokens",
        examples=len(tokenized.examples),
        truncated=tokenized.truncated,
        dropped=tokenized.dropped,
        rows=len(rows.batch),
        fill=round(rows.fill, 4),
    )
    trainer = Trainer(run, model, rows, validation, packed=packed)
    trained = trainer.run()
    path = run.work / "adapter.lora.h5"
    save_adapter(path, model.lora, trained.lora)
    run.put_file(ADAPTER, path)
    run.put(HISTORY, trainer.history())
    return TrainOutcome(
        model=_model_info(run, model),
        training=_training(run, tokenized, trained),
        fill=rows.fill,
    )


def _rows(
    run: Run, model: LanguageModel, key: str, *, packed: bool
) -> tuple[Tokenized, PackedRows]:
    train = run.spec.train
    found = tokenize(read_examples(run, key), model.codec, train.max_length, train.loss_on)
    if not found.examples:
        raise UsageError(
            f"train.max_length: no example of {key} has a response within {train.max_length} "
            "tokens; raise it"
        )
    return found, make_rows(found.examples, train.row_length, packing=packed)


def _model_info(run: Run, model: LanguageModel) -> ModelInfo:
    spec = run.spec.model
    return ModelInfo(
        preset=spec.preset,
        revision=model.preset.revision,
        chat_template=model.codec.template.name,
        dtype=spec.dtype,
        lora_rank=model.lora.rank,
        lora_alpha=model.lora.alpha,
        lora_targets=sorted({target.path.rsplit("/", 1)[-1] for target in model.lora.targets}),
        parameters=ParameterCounts(total=model.parameters, trainable=model.lora.parameters),
    )


def _training(run: Run, tokenized: Tokenized, trained: Trained) -> Training:
    progress = trained.progress
    before, after = progress.validation_before, trained.validation_after
    busy = max(progress.seconds - progress.compile_seconds, 1e-9)
    return Training(
        steps=trained.steps,
        examples=len(tokenized.examples) * run.spec.train.epochs,
        truncated=tokenized.truncated,
        dropped=tokenized.dropped,
        tokens=TokenCounts(
            trained=progress.tokens,
            padded=trained.steps * trained.row_slots,
            loss=progress.loss_tokens,
        ),
        seconds=Seconds(
            total=round(progress.seconds, 3), compile=round(progress.compile_seconds, 3)
        ),
        tokens_per_second=round(progress.tokens / busy, 1),
        mfu=None,
        loss=Losses(
            train=progress.epoch_loss / progress.epoch_loss_tokens,
            validation_before=before[0] if before else None,
            validation_after=after[0],
        ),
        token_accuracy=Accuracies(
            train=progress.epoch_correct / progress.epoch_loss_tokens, validation=after[1]
        ),
    )
