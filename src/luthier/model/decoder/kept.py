"""The matrices of a base in 4 bits, kept as they were quantised: the next start reads a quarter of the bytes.

A folder of the cache holds a file for each layer and the hash of each, and appears under its name when it is whole.
What lies in it are the very bytes of quantising anew: its name is a hash of everything that decides them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from luthier import json_reader
from luthier.assets.cache import build_once, code_hash, damaged, file_hash, forget_old, remembered_hash
from luthier.errors import RunError
from luthier.kernels import nf4
from luthier.kernels.nf4 import Packed
from luthier.run.atomic import write_json
from luthier.run.folder import require_space

RECORD = "files.json"  # name of a layer's file -> its sha256
WRITERS = 3  # layers that are written at one time: hashing is slower than reading the base
SHARED = ("table", "scale_table")  # the same for all matrices of a file
OWN = ("codes", "scales", "scale_scales")


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where quantised bases are kept.

    base: the content hash of the base. writes: whether this process keeps what was not yet there. tell: hears a line
    about what was kept, and why something was not.
    """

    root: Path
    base: str
    writes: bool = True
    tell: Callable[[str], None] = lambda text: None

    def folder(self, *, kind: str, double: bool, dtype: torch.dtype, device: str) -> Path:
        """Where the matrices lie that were quantised in this way, on such a device and by these libraries."""
        if device.startswith("cuda"):
            where = torch.cuda.get_device_name(device)
        else:  # the offset of doubly quantised scales is a mean, which the cores sum in parts
            where = f"{device} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
        versions = torch.__version__, metadata.version("bitsandbytes"), code_hash(Path(nf4.__file__), Path(__file__))
        made = "\0".join([self.base, kind, str(double), str(dtype), where, *versions])
        return self.root / "quantised" / hashlib.sha256(made.encode()).hexdigest()[:32]

    def read(self, folder: Path, layers: int, stack: ExitStack) -> Kept | None:
        """The first ``layers`` layers in ``folder``; None where they are not there, or damaged: then they are deleted.

        The content is compared with the record; a file whose hash is remembered for its size and times is not read.
        """
        if not folder.is_dir():
            return None
        names = [_name(number) for number in range(layers)]
        try:
            recorded = json_reader.read(folder / RECORD)
            with ThreadPoolExecutor(max_workers=4) as pool:
                found = list(pool.map(lambda name: remembered_hash(folder / name, self.root), names))
            if found != [recorded[name] for name in names]:
                raise ValueError("a file is not what was written")
            kept = Kept(folder, [stack.enter_context(safe_open(folder / name, "pt")) for name in names])
        except (ValueError, KeyError, TypeError, FileNotFoundError, SafetensorError) as error:
            self.tell(f"the quantised base in {folder} is damaged ({error}) and made again")
            shutil.rmtree(folder, ignore_errors=True)
            return None
        except OSError as error:
            self.tell(f"the quantised base in {folder} cannot be read: {error}")
            return None
        with suppress(OSError):  # of another user, who forgets what is old himself
            forget_old(folder)
        return kept

    def write(self, folder: Path, size: int, stack: ExitStack) -> Keeper | None:
        """What keeps about ``size`` bytes in ``folder`` until ``stack`` is closed; None where the disk is too full.

        As much again is left free: a run must not find the disk full for what the next one gains.
        """
        try:
            require_space(folder, 2 * size)
        except (RunError, OSError) as error:
            self.tell(_not_kept(error))
            return None
        return stack.enter_context(Keeper(folder, self.tell))


class Kept:
    """Matrices of a folder by name, read when they are asked for."""

    def __init__(self, folder: Path, files: list[Any]) -> None:
        self.folder = folder
        self._of: dict[str, Any] = {}
        for file in files:
            self._of |= {name.removesuffix(".codes"): file for name in file.keys() if name.endswith(".codes")}  # noqa: SIM118

    def read(self, name: str, shape: tuple[int, int]) -> Packed:
        """The matrix on the host, mapped from the file. Raises RunError run-damaged."""
        try:
            file = self._of[name]
            held = set(file.keys())
            tensors = {part: file.get_tensor(f"{name}.{part}") for part in OWN if f"{name}.{part}" in held}
            tensors |= {part: file.get_tensor(part) for part in SHARED if part in held}
            *found, block, scale_block = file.get_tensor(f"{name}.sizes").tolist()
            if tuple(found) != shape:
                raise ValueError(f"{name} has the shape {tuple(found)}, not {shape}")
            offset = file.get_tensor(f"{name}.offset").item()
            return Packed(**tensors, shape=shape, block=block, scale_block=scale_block, offset=offset)
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise damaged(self.folder, error) from error


class Keeper:
    """Writes matrices to a folder in threads of its own, a few layers behind the one that hands them over.

    Whatever goes wrong there is told at the end, and leaves neither a folder nor an error.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self.folder, self.tell = folder, tell
        self._layer: dict[str, Packed] = {}
        self._queue: Queue[dict[str, Packed] | None] = Queue(maxsize=1)
        self._layers = iter(self._queue.get, None)
        self._whole, self._why = False, ""
        self._thread = Thread(target=self._run, name="keep quantised base", daemon=True)

    def add(self, name: str, packed: Packed) -> None:
        """A matrix of the layer that is being made."""
        self._layer[name] = packed

    def end_layer(self) -> None:
        """The layer is complete. Waits while `WRITERS` others are being written and one waits."""
        self._queue.put(self._layer)
        self._layer = {}

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._whole = kind is None
        self._queue.put(None)
        self._thread.join()
        if self._whole and self._why:
            self.tell(self._why)

    def _run(self) -> None:
        try:
            build_once(self.folder, self._write, wait=0)
            forget_old(self.folder)
        except TimeoutError:
            pass  # another process is keeping the same
        except Exception as error:
            self._why = _not_kept(error)
        finally:
            for _ in self._layers:  # whoever hands them over does not wait for ever
                pass

    def _write(self, staging: Path) -> None:
        hashes: dict[str, str] = {}
        with ThreadPoolExecutor(WRITERS, "keep a layer") as pool:
            writing: deque[Future[tuple[str, str]]] = deque()
            for number, layer in enumerate(self._layers):
                writing.append(pool.submit(_write_layer, staging / _name(number), layer))
                if len(writing) == WRITERS:  # no more layers wait on the device
                    hashes |= [writing.popleft().result()]
            hashes |= [one.result() for one in writing]
        if not self._whole:
            raise ValueError("the base was not loaded to its end")
        size = sum(path.stat().st_size for path in staging.iterdir())
        write_json(staging / RECORD, hashes)
        self._why = f"the base in 4 bits ({size / 2**30:.2f} GiB) is kept in {self.folder}: the next start reads it"


def _name(layer: int) -> str:
    return f"layer-{layer}.safetensors"


def _write_layer(path: Path, layer: Mapping[str, Packed]) -> tuple[str, str]:
    """Write the file of a layer; its name and hash."""
    save_file(_tensors(layer), path)
    return path.name, file_hash(path)


def _tensors(layer: Mapping[str, Packed]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, matrix in layer.items():
        on_host = matrix.to("cpu")
        parts = {part: getattr(on_host, part) for part in (*OWN, *SHARED)}
        found |= {
            part if part in SHARED else f"{name}.{part}": held for part, held in parts.items() if held is not None
        }
        found[f"{name}.sizes"] = torch.tensor([*matrix.shape, matrix.block, matrix.scale_block])
        found[f"{name}.offset"] = torch.tensor(matrix.offset, dtype=torch.float64)
    return found


def _not_kept(error: Exception) -> str:
    why = error.faults[0].received if isinstance(error, RunError) else error
    return f"the base in 4 bits is not kept for the next start: {why}"
