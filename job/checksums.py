"""Checksums of Cloud Storage: CRC32C, as the API writes it."""

import base64
from pathlib import Path

_PIECE = 1024 * 1024


class Crc32c:
    """A CRC32C in the making, as the checksums of hashlib."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, piece: bytes, /) -> None:
        """Add what follows."""
        import google_crc32c

        self._value = google_crc32c.extend(self._value, piece)

    def hexdigest(self) -> str:
        """The checksum of what was added."""
        return f"{self._value:08x}"


def hex_of(checksum: str) -> str:
    """In hex what the API writes in base64.

    Raises:
        ValueError: it is no such checksum.
    """
    return base64.b64decode(checksum, validate=True).hex()


def crc32c(content: bytes) -> str:
    """The CRC32C of `content` as the API writes it."""
    import google_crc32c

    return base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()


def file_crc32c(path: Path) -> str:
    """The same of a file, read in pieces."""
    import google_crc32c

    value = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            value = google_crc32c.extend(value, piece)
    return base64.b64encode(value.to_bytes(4, "big")).decode()
