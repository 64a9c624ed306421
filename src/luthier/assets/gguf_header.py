"""Whether a GGUF file is as large as its header declares: read before a library trusts it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing is kept of what is read but its length.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> bytes
STRING, ARRAY = 8, 9
DIMENSIONS = 4  # at most, of a tensor
LONGEST_NAME = 1 << 16
NUMBERS = {4: "<I", 5: "<i", 10: "<Q", 11: "<q"}  # the types that sizes are written in
NEEDED = (".block_count", ".embedding_length")
MEASURES = (".block_count", ".embedding_length", ".feed_forward_length", ".head_count", ".head_count_kv", ".vocab_size")


def check(path: Path) -> None:
    """Walk through the header. Raises ValueError with what is wrong: it ends early, or declares what cannot be."""
    with path.open("rb") as stream:
        head = _Head(stream, path.stat().st_size)
        if head.take(4) != MAGIC:
            raise ValueError("it does not begin as a GGUF file")
        version, tensors, keys = head.numbers("<IQQ")
        if version not in VERSIONS:
            raise ValueError(f"version {version} of the format is not known")
        declared: dict[str, int] = {}
        architecture = ""
        for _ in range(head.count(keys, 13)):
            name = head.text()
            (kind,) = head.numbers("<I")
            if kind in NUMBERS and name.endswith(MEASURES):
                (declared[name],) = head.numbers(NUMBERS[kind])
            elif kind == STRING and name == "general.architecture":
                architecture = head.text()
            else:
                head.skip_value(kind)
        missing = [name for part in NEEDED if (name := f"{architecture}{part}") not in declared]
        if missing:  # a library would take a large model's for it
            raise ValueError(f"it lacks {', '.join(missing)}")
        largest = tensors
        for _ in range(head.count(tensors, 25)):
            head.text()
            (dimensions,) = head.numbers("<I")
            if dimensions > DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            *sizes, _, offset = head.numbers(f"<{dimensions}QIQ")
            largest = max(largest, *sizes) if sizes else largest
            if offset > head.size:
                raise ValueError(f"a tensor at byte {offset:,} of a file of {head.size:,}")
        if largest > head.size:
            raise ValueError(f"a tensor of {largest:,} in a file of {head.size:,} bytes")
        for name, value in declared.items():
            if value > largest:
                raise ValueError(f"{name} is {value:,}, and no tensor is as large")


class _Head:
    """Reads from a file and never beyond what it has."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size, self.at = stream, size, 0

    def count(self, declared: int, least: int) -> int:
        """A number of things of at least so many bytes, if the rest of the file can hold them."""
        if declared * least > self.size - self.at:
            raise ValueError(f"it declares {declared:,} entries, and ends after {self.size:,} bytes")
        return declared

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self.count(count, 1)
        self.at += count
        return self.stream.read(count)

    def numbers(self, form: str) -> tuple[int, ...]:
        """The next numbers."""
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def skip(self, count: int) -> None:
        """Pass over bytes."""
        self.at += self.count(count, 1)
        self.stream.seek(self.at)

    def text(self) -> str:
        """The next name. Raises UnicodeDecodeError, which is a ValueError."""
        (length,) = self.numbers("<Q")
        if length > LONGEST_NAME:
            raise ValueError(f"a name of {length:,} bytes")
        return self.take(length).decode()

    def skip_text(self) -> None:
        """Pass over a text."""
        self.skip(self.numbers("<Q")[0])

    def skip_value(self, kind: int) -> None:
        """Pass over a value of a type; arrays of arrays are not known to any writer."""
        if kind == STRING:
            self.skip_text()
        elif kind == ARRAY:
            inner, count = self.numbers("<IQ")
            if inner == STRING:
                for _ in range(self.count(count, 8)):
                    self.skip_text()
            else:
                self.skip(self.count(count, _size(inner)) * _size(inner))
        else:
            self.skip(_size(kind))


def _size(kind: int) -> int:
    if kind not in SIZES:
        raise ValueError(f"a value of type {kind}, which is not known")
    return SIZES[kind]
