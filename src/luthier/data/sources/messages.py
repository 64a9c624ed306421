"""What the messages of an Arrow stream declare of themselves, before anything of them is unpacked.

The format: https://arrow.apache.org/docs/format/Columnar.html, its messages' metadata in FlatBuffers
(https://flatbuffers.dev/internals/). A compressed buffer begins with the size that it unpacks to.
"""

from __future__ import annotations

import struct
from typing import Any

DICTIONARY, BATCH = 2, 3  # kinds of messages that have a body of values


def declared(source: Any) -> tuple[int, int]:
    """Bytes that the rest of a stream unpacks to beyond its own, and its rows. Raises ValueError for what is damaged.

    ``source``: an Arrow input stream at the beginning of the messages.
    """
    import pyarrow as pa

    taken = rows = 0
    try:
        for message in pa.ipc.MessageReader.open_stream(source):
            found = _Table.root(memoryview(message.metadata))
            kind, header = found.number(1, "<B"), found.table(2)
            if header is not None and kind == DICTIONARY:
                header = header.table(1)
            if header is None or kind not in (DICTIONARY, BATCH):
                continue
            rows += header.number(0, "<q") if kind == BATCH else 0
            if header.table(3) is not None:
                taken += _unpacked(header, memoryview(message.body))
    except (struct.error, IndexError) as error:
        raise ValueError("a message's metadata is damaged") from error
    return taken, rows


def _unpacked(batch: _Table, body: memoryview) -> int:
    """The sizes that a batch's compressed buffers begin with; -1 stands before one that was left as it was."""
    total = 0
    for offset, length in batch.pairs(2):
        if length:
            (size,) = struct.unpack_from("<q", body, offset)
            total += size if size >= 0 else 0
    return total


class _Table:
    """A table of a FlatBuffer: fields by their number, absent ones as 0 or None."""

    def __init__(self, data: memoryview, at: int) -> None:
        self.data, self.at = data, at
        self.fields = at - self._read("<i", at)

    @classmethod
    def root(cls, data: memoryview) -> _Table:
        return cls(data, struct.unpack_from("<I", data)[0])

    def number(self, field: int, form: str) -> int:
        """A number in the table itself."""
        place = self._place(field)
        return self._read(form, place) if place else 0

    def table(self, field: int) -> _Table | None:
        """A table that the field points to."""
        place = self._place(field)
        return _Table(self.data, place + self._read("<I", place)) if place else None

    def pairs(self, field: int) -> list[tuple[int, int]]:
        """A vector of structures of two 64-bit numbers."""
        place = self._place(field)
        if not place:
            return []
        begin = place + self._read("<I", place)
        count = self._read("<I", begin)
        numbers = struct.unpack_from(f"<{2 * count}q", self.data, begin + 4)
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def _place(self, field: int) -> int:
        known = self._read("<H", self.fields)
        offset = self._read("<H", self.fields + 4 + 2 * field) if 4 + 2 * field < known else 0
        return self.at + offset if offset else 0

    def _read(self, form: str, at: int) -> int:
        if at < 0:
            raise IndexError
        return int(struct.unpack_from(form, self.data, at)[0])
