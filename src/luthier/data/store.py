"""Tokenised examples on disk, memory-mapped: as many as there are, in memory that does not grow with them.

A folder holds, for each split, four plain arrays and nothing else: the ids of all examples end to end (uint32), their
weights (one byte each where all are 0 or 1, else float32), where each example ends (int64), and its row and turn
(int64). `StoreWriter` appends, `ExampleStore` reads an example at a time.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, overload

from luthier.assets.cache import damaged, read_made
from luthier.types import Example

if TYPE_CHECKING:
    import numpy as np

BUFFER = 1 << 20  # tokens kept before they are written
ARRAYS = ("ids", "weights", "ends", "origins")
WHOLE, FRACTIONAL = "u1", "<f4"  # what weights are written as


class ExampleStore(Sequence[Example]):
    """The examples of one split. Indexing makes an `Example`; a slice is another store over the same files."""

    def __init__(self, folder: Path, split: str, chosen: range | None = None) -> None:
        """``folder`` was written by `StoreWriter`; ``chosen`` restricts the store to some examples.

        Raises RunError ``run-damaged`` when its files are not as they were written.
        """
        import numpy as np

        self._folder, self._split = folder, split
        described = read_made(folder / f"{split}.json")
        try:
            self._ids = _mapped(folder / f"{split}.ids", np.dtype("<u4"))
            kind = (WHOLE, FRACTIONAL).index(described["weights"])  # no other: an array of objects would be addresses
            self._weights = _mapped(folder / f"{split}.weights", np.dtype((WHOLE, FRACTIONAL)[kind]))
            self._ends = _mapped(folder / f"{split}.ends", np.dtype("<i8"))
            self._origins = _mapped(folder / f"{split}.origins", np.dtype("<i8")).reshape(-1, 2)
            tokens = int(self._ends[-1]) if len(self._ends) else 0
            if not len(self._ids) == len(self._weights) == tokens or len(self._origins) != len(self._ends):
                raise ValueError(f"the arrays of {split} do not belong together")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise damaged(folder, error) from error
        self._chosen = range(len(self._ends)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ExampleStore: ...
    def __getitem__(self, index: int | slice) -> Example | ExampleStore:
        if isinstance(index, slice):
            return ExampleStore(self._folder, self._split, self._chosen[index])
        at = self._chosen[index]
        begin, end = int(self._ends[at - 1]) if at else 0, int(self._ends[at])
        row, turn = self._origins[at].tolist()
        weights = tuple(map(float, self._weights[begin:end].tolist()))
        return Example(tuple(self._ids[begin:end].tolist()), weights, row, turn)

    @property
    def lengths(self) -> array[int]:
        """Tokens of each example, in order; 4 bytes each."""
        import numpy as np

        sizes = np.diff(self._ends, prepend=0)[self._chosen.start : self._chosen.stop : self._chosen.step]
        return array("i", sizes.astype("i4").tobytes())

    @property
    def rows(self) -> array[int]:
        """The rows of the table that the examples come from, in order, each once; 8 bytes each."""
        import numpy as np

        rows = self._origins[:, 0]
        kept = rows[np.flatnonzero(np.diff(rows, prepend=-1))] if len(rows) else rows
        return array("q", np.ascontiguousarray(kept, dtype="i8").tobytes())


class StoreWriter:
    """Writes the examples of one split into ``folder``. Use as a context; `append` in order of the rows."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._ids, self._weights = array("I"), array("f")
        self._end = self._count = 0
        self._fractional = False
        self._stack = ExitStack()
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> StoreWriter:
        for name in ARRAYS:
            self._files[name] = self._stack.enter_context((self._folder / f"{self._split}.{name}").open("wb"))
        self._ends, self._origins = array("q"), array("q")
        return self

    def append(self, example: Example) -> None:
        """Add one example."""
        self._ids.extend(example.ids)
        self._weights.extend(example.weights)
        self._end += len(example.ids)
        self._ends.append(self._end)
        self._origins.extend((example.row, example.turn))
        if len(self._ids) >= BUFFER:
            self._flush()

    def __exit__(self, kind: Any, *rest: object) -> None:
        self._flush()
        self._stack.close()
        if kind is None:
            self._finish()

    def _flush(self) -> None:
        import numpy as np

        weights = np.frombuffer(self._weights, dtype="f4") if self._weights else np.empty(0, "f4")
        self._fractional = self._fractional or bool(((weights != 0) & (weights != 1)).any())
        self._files["ids"].write(np.array(self._ids, dtype="<u4").tobytes())
        self._files["weights"].write(weights.astype("<f4").tobytes())
        self._files["ends"].write(np.array(self._ends, dtype="<i8").tobytes())
        self._files["origins"].write(np.array(self._origins, dtype="<i8").tobytes())
        del weights
        for kept in (self._ids, self._weights, self._ends, self._origins):
            del kept[:]

    def _finish(self) -> None:
        """Weights that are all 0 or 1 take a byte each; then the description, which makes the split readable."""
        import numpy as np

        path = self._folder / f"{self._split}.weights"
        if not self._fractional:
            whole = _mapped(path, np.dtype("<f4"))
            narrow = path.with_suffix(".narrow")
            with narrow.open("wb") as out:
                for at in range(0, len(whole), BUFFER):
                    out.write(np.asarray(whole[at : at + BUFFER]).astype("u1").tobytes())
            del whole
            narrow.replace(path)
        described = {"format": 1, "weights": FRACTIONAL if self._fractional else WHOLE}
        (self._folder / f"{self._split}.json").write_text(json.dumps(described), encoding="utf-8")


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
