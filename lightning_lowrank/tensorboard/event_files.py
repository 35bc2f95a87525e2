"""Damage in event files, which TensorBoard's readers pass over in silence: they stop at it, or show what it says."""

import struct
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event

# Files that TensorBoard takes for event files.
PATTERN = "*tfevents*"
# Bytes of which a checksum is computed at once.
BLOCK = 4096


class EventFiles:
    """The event files of a log directory, each read on from where it was last.

    Args:
        logs: The directory; None if nobody knows it.
    """

    def __init__(self, logs: Path | None) -> None:
        self._logs = logs
        self._files: dict[Path, EventFile] = {}
        self._lock = Lock()

    def damage(self, run: str) -> list[str]:
        """A sentence for each damaged file of a run."""
        if self._logs is None:
            return []
        with self._lock:
            files = [self._files.setdefault(path, EventFile(path)) for path in sorted((self._logs / run).glob(PATTERN))]
            return [f"{file.path.relative_to(self._logs)} {said}" for file in files if (said := file.damage())]


class EventFile:
    """One event file: records of 8 bytes of length, 4 of checksum, an event, and 4 of checksum.

    Args:
        path: Its path; a writer may still add to it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._offset, self._step = path, 0, -1

    def damage(self) -> str:
        """What is wrong with it, if anything is; a last record of which the end is still missing is no damage."""
        try:
            is_damaged = self._read_on()
        except OSError:  # whoever shows the numbers will say so
            return ""
        if not is_damaged:
            return ""
        if self._step < 0:
            return "is damaged at its beginning: none of its numbers can be read"
        return f"is damaged after step {self._step}: its later numbers are missing or wrong"

    def _read_on(self) -> bool:
        size = self.path.stat().st_size
        if size < self._offset:  # another file in its place
            self._offset, self._step = 0, -1
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while len(header := file.read(12)) == 12:
                length, checksum = struct.unpack("<QI", header)
                if masked_crc32c(header[:8]) != checksum:
                    return True
                if length + 4 > size - file.tell():
                    return False
                body = file.read(length + 4)
                if masked_crc32c(body[:-4]) != struct.unpack("<I", body[-4:])[0]:
                    return True
                try:
                    self._step = max(self._step, Event.FromString(body[:-4]).step)
                except DecodeError:
                    return True
                self._offset = file.tell()
        return False


def masked_crc32c(data: bytes) -> int:
    """The checksum of event files: CRC-32C, rotated. TensorBoard's own takes a second for 6 MB.

    Examples:
        >>> hex(masked_crc32c(b"123456789"))
        '0xc78ab0e5'
    """
    crc = 0xFFFFFFFF
    for start in range(0, len(data), BLOCK):
        block = np.frombuffer(data[start : start + BLOCK], np.uint8).copy()
        head = min(4, len(block))
        block[:head] ^= np.frombuffer(struct.pack("<I", crc), np.uint8)[:head]
        parts = _tables()[np.arange(len(block) - 1, -1, -1), block]
        crc = int(np.bitwise_xor.reduce(parts)) ^ (crc >> 8 * head if head < 4 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def _tables() -> NDArray[np.uint32]:
    """`[zeros, byte]`: what a byte with so many zero bytes behind it gives, which is all, as a CRC is linear."""
    table: NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ (table & np.uint32(1)) * np.uint32(0x82F63B78)
    tables = [table]
    for _ in range(BLOCK - 1):
        tables.append(table[tables[-1] & 0xFF] ^ (tables[-1] >> 8))
    return np.stack(tables)
