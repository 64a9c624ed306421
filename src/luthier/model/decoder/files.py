"""The tensors of a model folder, read when they are asked for: mapped on the host, or lifted to a GPU.

Copying a mapped file to a GPU touches its pages one by one, in one thread, at about 1 GB/s. So pieces are read by
several threads into pinned memory, and go on from there while the next ones are read.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from safetensors import safe_open

from luthier.assets.spec import Place, places, weight_files
from luthier.errors import AssetError

PIECE = 8 * 2**20  # bytes that are read at one time
READERS = 6  # threads that read; each has a piece on its way


class Files:
    """The tensors of ``folder`` by name, until ``stack`` is closed; ``device``: where `to_device` brings them.

    Raises AssetError asset-damaged, here and in reading, for a file that is not what its header says.
    """

    def __init__(self, folder: Path, stack: ExitStack, device: str = "cpu") -> None:
        self.folder = folder
        self._of: dict[str, Any] = {}
        self._places: dict[str, tuple[Path, Place]] = {}
        for path in weight_files(folder):
            handle = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            self._of |= dict.fromkeys(handle.keys(), handle)
            self._places |= {name: (path, place) for name, place in places(path).items()}
        lifted = device.startswith("cuda") and hasattr(os, "preadv")  # which Windows has not
        self._lift = stack.enter_context(Lift(device)) if lifted else None

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor on the host, mapped from the file."""
        if name not in self._of:
            raise self._damaged(f"it has no weight {name}")
        value: torch.Tensor = self._of[name].get_tensor(name)
        if tuple(value.shape) != shape:
            raise self._damaged(f"{name} has the shape {tuple(value.shape)}, not {shape}")
        return value

    def to_device(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor on its way to the device, of the type that the file has; mapped, where nothing lifts it."""
        mapped = self.read(name, shape)
        if self._lift is None:
            return mapped
        value = torch.empty(shape, dtype=mapped.dtype, device=self._lift.device)
        path, place = self._places[name]
        try:
            self._lift.fill(value, path, place.begin)
        except OSError as error:
            raise self._damaged(f"{name} cannot be read from {path.name}: {error}") from error
        return value

    def _damaged(self, why: str) -> AssetError:
        return AssetError(
            "asset-damaged",
            f"the base model's files are incomplete: {why}",
            where=str(self.folder),
            received=why,
            allowed="all weights of the architecture in config.json",
            fix="get the model again",
        )


@dataclass(frozen=True, slots=True)
class _Slot:
    """Host memory for a piece, and the event that says that it has left for the device."""

    held: torch.Tensor
    left: torch.cuda.Event | None


class Lift:
    """Fills tensors on ``device`` from files, piece by piece. On a CPU it does the same without a stream of its own."""

    def __init__(self, device: str) -> None:
        self.device = device
        cuda = device.startswith("cuda")
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._slots: Queue[_Slot] = Queue()
        for _ in range(READERS):
            held = torch.empty(PIECE, dtype=torch.uint8, pin_memory=cuda)
            self._slots.put(_Slot(held, torch.cuda.Event() if cuda else None))
        self._pool = ThreadPoolExecutor(READERS, "lift")
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Lift:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)
        if self._stream is not None:
            self._stream.synchronize()  # before the pinned memory goes

    def fill(self, value: torch.Tensor, path: Path, begin: int) -> None:
        """``value`` (contiguous, on the device) gets the bytes of ``path`` from ``begin`` on.

        Whoever uses the device's current stream finds them there. Raises OSError, also when the file is too short.
        """
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        raw = value.view(-1).view(torch.uint8)
        if self._stream is not None:  # what used this memory before may not have ended
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        starts = range(0, len(raw), PIECE)
        pieces = [(self._files[path], begin + start, raw[start : start + PIECE]) for start in starts]
        list(self._pool.map(self._move, pieces))
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _move(self, piece: tuple[int, int, torch.Tensor]) -> None:
        descriptor, place, into = piece
        slot = self._slots.get()
        try:
            if slot.left is not None:
                slot.left.synchronize()
            count = len(into)
            _read(descriptor, memoryview(slot.held.numpy().data)[:count], place)
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                into.copy_(slot.held[:count], non_blocking=True)
            if slot.left is not None:
                slot.left.record(self._stream)
        finally:
            self._slots.put(slot)


def _read(descriptor: int, into: memoryview, place: int) -> None:
    """Fill ``into`` with the bytes of a file from ``place`` on. Raises OSError when it ends before."""
    while into:
        count = os.preadv(descriptor, [into], place)
        if not count:
            raise OSError("the file is shorter than its header says")
        into, place = into[count:], place + count
