"""The train stage: examples to rows, rows to an adapter, the adapter to its file."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from job import logs
from job.data.packing import PackedRows, Tokenized, ladder, make_rows, tokenize
from job.data.stage import TRAIN, VALIDATION, read_examples
from job.errors import UsageError
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
from job.train.adapter_files import exportable, write_adapter
from job.train.loop import Trained, Trainer


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
    prepared = run.ahead.take() if run.ahead else prepare(run)
    model, tokenized, trainer = prepared.model, prepared.tokenized, prepared.trainer
    matrices = exportable(model)
    trained = trainer.run()
    write_adapter(run, model, trained.lora, matrices)
    for key, content in trainer.curves().items():
        run.put(key, content)
    return TrainOutcome(
        model=_model_info(run, model),
        training=_training(run, tokenized, trained),
        fill=prepared.fill,
    )


@dataclass(frozen=True)
class Prepared:
    """A training that is ready to begin."""

    model: LanguageModel
    tokenized: Tokenized
    fill: float
    trainer: Trainer


def prepare(run: Run) -> Prepared:
    """Examples to rows, and the model to a trainer for them.

    Raises:
        UsageError: no example fits the spec's lengths.
    """
    model = run.model()
    packed = run.spec.train.packing and model.can_pack
    if run.spec.train.packing and not packed:
        logs.get().warning(
            "packing is not known to be sound for this family of models: one example a row "
            "instead, padded to the next of a few lengths",
            family=model.family,
        )
    tokenized, rows = _rows(run, model, TRAIN, packed=packed)
    _, validation = _rows(run, model, VALIDATION, packed=packed, lengths=rows.ladder)
    logs.get().info(
        "examples are tokens",
        examples=len(tokenized.examples),
        truncated=tokenized.truncated,
        dropped=tokenized.dropped,
        rows=len(rows.batch),
        fill=round(rows.fill, 4),
    )
    return Prepared(
        model, tokenized, rows.fill, Trainer(run, model, rows, validation, packed=packed)
    )


def _rows(
    run: Run, model: LanguageModel, key: str, *, packed: bool, lengths: Sequence[int] = ()
) -> tuple[Tokenized, PackedRows]:
    train = run.spec.train
    found = tokenize(read_examples(run, key), model.codec, train.max_length, train.loss_on)
    if not found.examples:
        raise UsageError(
            f"train.max_length: no example of {key} has a response within {train.max_length} "
            "tokens; raise it"
        )
    if packed:
        return found, make_rows(found.examples, train.row_length, packing=True)
    lengths = lengths or ladder(
        [len(example.tokens) for example in found.examples], train.max_length, train.buckets
    )
    return found, make_rows(found.examples, train.max_length, packing=False, lengths=lengths)


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
    assert before is not None
    return Training(
        steps=progress.step,
        kept_step=after.step if run.spec.train.keep == "best" else progress.step,
        stopped_early=progress.stopped,
        examples=len(tokenized.examples) * run.spec.train.epochs,
        truncated=tokenized.truncated,
        dropped=tokenized.dropped,
        tokens=TokenCounts(
            trained=progress.tokens,
            padded=progress.slots,
            loss=progress.loss_tokens,
        ),
        seconds=Seconds(
            total=round(progress.seconds, 3), compile=round(progress.compile_seconds, 3)
        ),
        tokens_per_second=round(progress.tokens / max(progress.busy, 1e-9), 1),
        mfu=trained.mfu,
        loss=Losses(
            train=progress.epoch_loss / progress.epoch_loss_tokens,
            validation_before=before.loss,
            validation_after=after.loss,
        ),
        token_accuracy=Accuracies(
            train=progress.epoch_correct / progress.epoch_loss_tokens,
            validation=after.token_accuracy,
        ),
    )
