"""Metrics: the history as TensorBoard events, and model FLOPs utilization."""

import struct

import google_crc32c
import pytest
from tensorboardX.proto.event_pb2 import Event

from job.train.checkpoint import TrainProgress, Validation
from job.train.metrics import (
    HISTORY,
    History,
    event_file,
    model_flops_utilization,
)

LINES = [
    {"step": 0, "time": 100.5, "validation_loss": 2.5, "validation_token_accuracy": 0.25},
    {"step": 1, "time": 101.0, "loss": 2.0, "mfu": None, "learning_rate": 0.125, "seconds": 9},
    {"step": 2, "time": 102.0, "loss": 1.5, "mfu": 0.5, "learning_rate": 0.0625, "seconds": 10},
]


def masked(data: bytes) -> int:
    """The checksum of a TFRecord: CRC-32C, rotated and offset."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def records(content: bytes) -> list[bytes]:
    bodies, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        header, body = content[at : at + 8], content[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", content, at + 8)[0] == masked(header)
        assert struct.unpack_from("<I", content, at + 12 + length)[0] == masked(body)
        bodies.append(body)
        at += 16 + length
    return bodies


def test_every_metric_of_the_history_is_an_event() -> None:
    events = [Event.FromString(record) for record in records(event_file(LINES))]
    assert events[0].file_version == "brain.Event:2"
    written = [
        (event.step, event.wall_time, value.tag, value.simple_value)
        for event in events
        for value in event.summary.value
    ]
    assert written == [
        (0, 100.5, "loss/validation", 2.5),
        (0, 100.5, "token_accuracy/validation", 0.25),
        (1, 101.0, "loss/train", 2.0),
        (1, 101.0, "optimizer/learning_rate", 0.125),
        (2, 102.0, "loss/train", 1.5),
        (2, 102.0, "optimizer/learning_rate", 0.0625),
        (2, 102.0, "speed/mfu", 0.5),
    ]


def test_a_later_event_file_starts_with_the_earlier_events() -> None:
    early, late = (records(event_file(LINES[:n])) for n in (2, 3))
    assert late[1 : len(early)] == early[1:]


def test_history_resumes_and_replaces_a_repeated_validation() -> None:
    history = History()
    history.add_step(1, {"loss": 2.0})
    history.add_validation(Validation(step=1, loss=2.5, token_accuracy=0.25))
    history.add_step(2, {"loss": 1.5})
    resumed = History(history.files()[HISTORY], last_step=1)
    assert resumed.lines == history.lines[:2]
    resumed.add_validation(Validation(step=1, loss=2.25, token_accuracy=0.5))
    losses = [line.get("loss", line.get("validation_loss")) for line in resumed.lines]
    assert losses == [2.0, 2.25]


def utilization(
    loss_tokens: int, seconds: float = 2.0, kind: str = "TPU v5 lite", devices: int = 8
) -> float | None:
    tokens = 10**9
    progress = TrainProgress(tokens=tokens, loss_tokens=loss_tokens, seconds=seconds)
    return model_flops_utilization(progress, 1000, 300, kind, devices)


def test_training_needs_four_flops_a_parameter_and_token() -> None:
    peak = 2.0 * 8 * 197e12
    assert utilization(10**9) == pytest.approx(4 * 1000e9 / peak)
    # The output projection is for loss tokens only.
    assert utilization(4 * 10**8) == pytest.approx(4 * (700e9 + 120e9) / peak)


def test_utilization_is_the_share_of_all_devices_peak() -> None:
    assert utilization(10**9, devices=16) == pytest.approx(4 * 1000e9 / (2.0 * 16 * 197e12))
    assert utilization(10**9, kind="cpu") is None
    assert utilization(10**9, kind="an unknown chip") is None
    assert utilization(10**9, seconds=0.0) is None
