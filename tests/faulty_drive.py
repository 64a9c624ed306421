"""Storage that is no disk, at its worst: an fsspec file system that tears writes and loses calls."""

from __future__ import annotations

import random
from typing import Any

from fsspec.implementations.local import LocalFileSystem


class Faulty(LocalFileSystem):
    """A drive that tears writes and loses calls: each write fails with a chance, after a part of it has arrived."""

    cachable = False

    def __init__(self, chance: float, seed: int) -> None:
        super().__init__()
        self.chance, self.draw = chance, random.Random(seed)

    def open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        inner = super().open(path, mode, **more)
        if "w" not in mode or self.draw.random() > self.chance:
            return inner
        return Torn(inner, self.draw)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        if self.draw.random() < self.chance / 4:
            raise OSError("the drive is away")
        super().makedirs(path, exist_ok=exist_ok)


class Torn:
    def __init__(self, inner: Any, draw: random.Random) -> None:
        self.inner, self.draw = inner, draw

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *_: Any) -> None:
        self.inner.close()

    def write(self, content: bytes) -> None:
        self.inner.write(content[: self.draw.randrange(len(content))])
        if self.draw.random() < 0.5:
            raise OSError("the drive went away in the middle")
        # else it says that all is well, as such storage does
