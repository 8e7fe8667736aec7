"""Models and trainings that several tests of training share."""

import pytest

from job.model.language_model import LanguageModel
from job.train.trainer import TrainResult
from tests.train.small import TWO_MATRICES, make_trainer, small_model


@pytest.fixture(scope="session")
def small() -> LanguageModel:
    """The small model on one device, two matrices of each block adapted."""
    return small_model(lora=TWO_MATRICES)


@pytest.fixture(scope="session")
def trained(small: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """An uninterrupted training with AdamW."""
    return make_trainer(tmp_path_factory.mktemp("trained"), small)[0].run()


@pytest.fixture(scope="session")
def trained_by_sgd(small: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """An uninterrupted training with plain gradient descent, which magnifies no rounding."""
    folder = tmp_path_factory.mktemp("sgd")
    return make_trainer(folder, small, optimizer="sgd", learning_rate=0.3)[0].run()
