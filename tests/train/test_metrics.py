"""The event file holds the history as TensorBoard's own format has it."""

import struct

import google_crc32c
from tensorboardX.proto.event_pb2 import Event

from job.train.metrics import event_file

HISTORY = [
    {"step": 0, "time": 100.5, "validation_loss": 2.5, "validation_token_accuracy": 0.25},
    {"step": 1, "time": 101.0, "loss": 2.0, "mfu": None, "learning_rate": 0.125, "seconds": 9},
    {"step": 2, "time": 102.0, "loss": 1.5, "mfu": 0.5, "learning_rate": 0.0625, "seconds": 10},
]


def masked(data: bytes) -> int:
    """The checksum of a TFRecord: CRC-32C, rotated and offset."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def records(content: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        header, body = content[at : at + 8], content[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", content, at + 8)[0] == masked(header)
        assert struct.unpack_from("<I", content, at + 12 + length)[0] == masked(body)
        found.append(body)
        at += 16 + length
    return found


def test_every_figure_of_the_history_is_an_event() -> None:
    events = [Event.FromString(record) for record in records(event_file(HISTORY))]
    assert events[0].file_version == "brain.Event:2"
    found = [
        (event.step, event.wall_time, value.tag, value.simple_value)
        for event in events
        for value in event.summary.value
    ]
    assert found == [
        (0, 100.5, "loss/validation", 2.5),
        (0, 100.5, "token_accuracy/validation", 0.25),
        (1, 101.0, "loss/train", 2.0),
        (1, 101.0, "optimizer/learning_rate", 0.125),
        (2, 102.0, "loss/train", 1.5),
        (2, 102.0, "optimizer/learning_rate", 0.0625),
        (2, 102.0, "speed/mfu", 0.5),
    ]


def test_a_later_file_begins_with_the_events_of_an_earlier_one() -> None:
    early, late = (records(event_file(HISTORY[:n])) for n in (2, 3))
    assert late[1 : len(early)] == early[1:]
