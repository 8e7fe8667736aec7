"""The train stage: trains the adapter and writes it in every format the model supports.

Training itself is in `job.train`; how adapters are stored is in `job.adapters`.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from job.adapters.hf_weight_map import target_matrices
from job.adapters.keras_format import (
    CHAT_TEMPLATE,
    DESCRIPTION,
    H5,
    check_model,
    describe,
    load_adapter,
    read_info,
    save_adapter,
)
from job.adapters.locate import find_adapter
from job.adapters.low_rank import LinearMatrix
from job.adapters.peft_format import peft_files, to_peft
from job.adapters.warm_start import starting_lora
from job.data.packing import PackedRows, TokenizedExamples, length_buckets, make_rows, tokenize
from job.errors import StageError, UsageError
from job.model.language_model import LanguageModel
from job.model.lora import LoraLayout, LoraWeights
from job.pipeline.data_stage import read_examples
from job.pipeline.layout import (
    ADAPTER,
    PEFT_ADAPTER,
    TRAIN_EXAMPLES,
    TRAINING,
    VALIDATION_EXAMPLES,
)
from job.pipeline.run import Run
from job.report.model_card import license_in
from job.results import (
    Accuracies,
    Losses,
    ModelInfo,
    ParameterCounts,
    Seconds,
    TokenCounts,
    Training,
)
from job.runtime import logs
from job.storage.base import file_sha256
from job.storage.hub import CARD_FILE
from job.train.trainer import TrainData, Trainer, TrainerConfig, TrainResult


class TrainOutcome(BaseModel):
    """Outcome of the train stage."""

    model: ModelInfo
    training: Training


def run_stage(run: Run) -> TrainOutcome:
    """Fine-tune the model of the spec; write the adapter and the history.

    Raises:
        UsageError: no example fits the spec's lengths.
        RunStoppedError, StageError: see `Trainer.run`.
    """
    model = run.model()
    tokenized, trainer = _prepare(run, model)
    matrices = None
    try:
        matrices = target_matrices(model.backbone, model.lora)
    except UsageError as error:
        logs.get().warning("adapter loads in KerasHub only", reason=str(error))
    result = trainer.run()
    write_adapter(run, model, result.lora, matrices)
    for key, content in result.files.items():
        run.put(key, content)
    return TrainOutcome(model=_model_info(run, model), training=_training(run, tokenized, result))


def _prepare(run: Run, model: LanguageModel) -> tuple[TokenizedExamples, Trainer]:
    """Tokenize the examples, make rows of them, and build the trainer."""
    train = run.spec.train
    packed = train.packing and model.can_pack
    if train.packing and not packed:
        logs.get().warning(
            "packing is not supported for this model family; rows hold one example each",
            family=model.family,
        )
    tokenized, rows = _rows(run, model, TRAIN_EXAMPLES, packed=packed)
    _, validation = _rows(run, model, VALIDATION_EXAMPLES, packed=packed, buckets=rows.buckets)
    logs.get().info(
        "examples tokenized",
        examples=tokenized.used,
        truncated=tokenized.truncated,
        dropped=tokenized.dropped,
        rows=len(rows.batch),
        fill=round(rows.fill, 4),
    )
    uri = train.init_adapter
    earlier = find_adapter(uri, "train.init_adapter", ADAPTER, run.revisions) if uri else None
    initial_lora = starting_lora(run.spec, model, earlier, run.work / "init_adapter")
    config = TrainerConfig(
        train,
        run.spec.seed,
        packed,
        dropout=run.spec.model.lora.dropout,
        inputs_digest=run.digests["train"],
        folder=TRAINING,
    )
    data = TrainData(rows, validation, initial_lora)
    return tokenized, Trainer(model, data, config, run.store, run.coordinated_stop)


def _rows(
    run: Run, model: LanguageModel, key: str, *, packed: bool, buckets: Sequence[int] = ()
) -> tuple[TokenizedExamples, PackedRows]:
    train = run.spec.train
    tokenized = tokenize(read_examples(run, key), model.tokenizer, train.max_length, train.loss_on)
    examples = tokenized.examples
    if not examples:
        raise UsageError(
            f"no example in {key} has a response token within the first {train.max_length} tokens; "
            "raise train.max_length"
        )
    if packed:
        return tokenized, make_rows(examples, train.row_length, packing=True)
    buckets = buckets or length_buckets(
        [len(example.token_ids) for example in examples], train.max_length, train.buckets
    )
    return tokenized, make_rows(examples, train.max_length, packing=False, buckets=buckets)


def _model_info(run: Run, model: LanguageModel) -> ModelInfo:
    spec, template = run.spec.model, model.tokenizer.template
    return ModelInfo(
        preset=spec.preset,
        revision=model.preset.revision,
        chat_template=template.name,
        chat_template_source=template.source,
        chat_template_sha256=template.sha256,
        chat_template_text=template.text,
        chat_template_ignored=template.replaces_own,
        license=license_in(Path(model.preset.handle) / CARD_FILE),
        dtype=spec.dtype,
        lora_rank=model.lora.rank,
        lora_alpha=model.lora.alpha,
        lora_targets=sorted({target.path.rsplit("/", 1)[-1] for target in model.lora.targets}),
        parameters=ParameterCounts(total=model.parameters, trainable=model.lora.parameters),
    )


def _training(run: Run, tokenized: TokenizedExamples, result: TrainResult) -> Training:
    progress = result.progress
    before, after = progress.validation_before, result.validation_after
    assert before is not None
    return Training(
        steps=progress.step,
        kept_step=after.step if run.spec.train.keep == "best" else progress.step,
        stopped_early=progress.stopped_early,
        examples=tokenized.used * run.spec.train.epochs,
        truncated=tokenized.truncated,
        dropped=tokenized.dropped,
        tokens=TokenCounts(
            trained=progress.tokens,
            padded=progress.padded_tokens,
            loss=progress.loss_tokens,
        ),
        seconds=Seconds(
            total=round(progress.seconds, 3), compile=round(progress.compile_seconds, 3)
        ),
        tokens_per_second=round(progress.tokens / max(progress.step_seconds, 1e-9), 1),
        mfu=result.mfu,
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


def write_adapter(
    run: Run, model: LanguageModel, lora: LoraWeights, matrices: Sequence[LinearMatrix] | None
) -> None:
    """Write a trained adapter to the run, in every format that its model supports."""
    spec, path = run.spec.model, run.work / H5
    save_adapter(path, model.lora, lora)
    run.put_file(ADAPTER + H5, path)
    files = {H5: file_sha256(path)}
    if matrices is not None:
        adapter = to_peft(model, spec, lora, matrices)
        for name, content in peft_files(adapter).items():
            files[PEFT_ADAPTER + name] = run.put(f"{ADAPTER}{PEFT_ADAPTER}{name}", content).sha256
    template = model.tokenizer.template.text.encode()
    files[CHAT_TEMPLATE] = run.put(ADAPTER + CHAT_TEMPLATE, template).sha256
    info = describe(model.lora, model.family, spec.preset, model.preset.revision, files)
    run.put(ADAPTER + DESCRIPTION, (info.model_dump_json(indent=2) + "\n").encode())


def load_trained(run: Run, model: LanguageModel) -> tuple[LoraLayout, LoraWeights]:
    """Load the run's adapter from its file, so that what is evaluated is what was saved.

    Raises:
        UsageError: it belongs to another model.
        StageError: a file is missing or damaged.
    """
    info = read_info(run.fetch(ADAPTER + DESCRIPTION))
    check_model(info, run.spec.model.preset, model.family, ADAPTER + DESCRIPTION)
    path = run.fetch(ADAPTER + H5)
    if info.files.get(H5) != file_sha256(path):
        raise StageError(
            f"{ADAPTER}{H5} does not have the checksum in {DESCRIPTION}: "
            "it was truncated or modified"
        )
    return load_adapter(path, model.lora)
