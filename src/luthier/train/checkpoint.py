"""Checkpoints: staged, hashed, synced, renamed into place once; read back only when every byte is as it was written.

step-000120/weights.safetensors    the trainable weights
step-000120/optimizer.safetensors  the tensors of the optimizer's state
step-000120/state.json             everything else: steps, hooks, source, random state
step-000120/manifest.json          sha256 and size of the others
"""

from __future__ import annotations

import base64
import json
import mmap
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from luthier import json_reader
from luthier.errors import RunError
from luthier.run import atomic, manifest
from luthier.train import tensorfile

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")
LARGE = 2**16  # bytes: what malloc would keep for later when it is freed
_STAGING = ".staging-"
_DAMAGED = "damaged-"  # set aside, until a whole one takes its place
_REPLACED = "replaced-"  # whole, and moved away for one that takes its place


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: tensors on the CPU, the rest as JSON types."""

    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer: Any
    state: Mapping[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step of the checkpoint at ``path``."""
    return int(path.name.removeprefix("step-"))


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, rising; staging folders do not count."""
    names = (_NAME.fullmatch(one.name) for one in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in names if match)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, apart from the run: tensors on the CPU under their names, the rest as JSON types."""

    step: int
    weights: Mapping[str, torch.Tensor]
    tensors: Mapping[str, torch.Tensor]  # of the optimizer
    record: Mapping[str, Any]


def size_of(weights: Mapping[str, torch.Tensor], optimizer: Any) -> int:
    """Bytes of the tensors of a checkpoint."""
    tensors = [*weights.values(), *_take_tensors(optimizer, copy=False)[1].values()]
    return sum(one.numel() * one.element_size() for one in tensors)


def snapshot(
    step: int, weights: Mapping[str, torch.Tensor], optimizer: Any, state: Mapping[str, Any], *, copy: bool = True
) -> Snapshot:
    """Take what a checkpoint holds. Without ``copy`` it changes with the run: write it before the next step."""
    tree, tensors = _take_tensors(optimizer, copy=True)  # optimizers share tables between weights; files cannot
    taken = {name: _copied(value) if copy else value.detach().cpu().contiguous() for name, value in weights.items()}
    # through JSON now: hooks hand out the lists that they go on filling
    record = json.dumps({"format": FORMAT, "step": step, "optimizer": tree, **state}, ensure_ascii=False)
    return Snapshot(step, taken, tensors, json.loads(record))


def save(folder: Path, step: int, taken: Snapshot) -> Path:
    """Write the checkpoint of a step whole, or not at all. Raises RunError run-no-space or run-damaged."""
    final = path_of(folder, step)
    staging = folder / f"{_STAGING}{step}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_STAGING}*"):  # of a process that died; only one process writes to a run
            shutil.rmtree(left)
        staging.mkdir()
        tensorfile.write(staging / "weights.safetensors", taken.weights)
        tensorfile.write(staging / "optimizer.safetensors", taken.tensors)
        (staging / "state.json").write_text(json.dumps(taken.record, ensure_ascii=False), encoding="utf-8")
        manifest.write(staging)
        for one in staging.iterdir():
            atomic.sync_file(one)
        atomic.sync_folder(staging)
        replaced = final.with_name(f"{_REPLACED}{final.name}")
        if final.exists():  # of a way that was given up, or with an evaluation that was still to come
            final.rename(replaced)
        staging.rename(final)
        atomic.sync_folder(folder)
        if replaced.exists():
            _delete(replaced)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise RunError(
            "run-no-space" if atomic.is_full(error) else "run-damaged",
            f"the checkpoint of step {step} could not be written: {error}",
            where=str(final),
            received=str(error),
            fix="make room on the disk (or raise `ulimit -f`), then run the same command again: it goes on from the "
            "checkpoint before",
        ) from error
    return final


def recover(folder: Path) -> None:
    """Put back a checkpoint that a process moved away and died before another one was in its place.

    What it had begun to write or to delete goes away.
    """
    for left in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(left)
    for path in folder.glob(f"{_REPLACED}step-*"):
        final = path.with_name(path.name.removeprefix(_REPLACED))
        if final.exists():
            _delete(path)
        else:
            path.rename(final)


def load(folder: Path, step: int) -> Checkpoint:
    """Read and verify a checkpoint. Raises RunError run-damaged when its content is not what its manifest says."""
    path = path_of(folder, step)
    try:
        wrong = manifest.faults(path)
        if wrong:
            raise ValueError("; ".join(wrong))
        state = json_reader.read(path / "state.json")
        if state["step"] != step:
            raise ValueError(f"it is the checkpoint of step {state['step']}")
        optimizer = _put_tensors(state.pop("optimizer"), load_file(path / "optimizer.safetensors"))
        return Checkpoint(step, load_file(path / "weights.safetensors"), optimizer, state)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            "run-damaged",
            f"the checkpoint of step {step} is damaged: {error}",
            where=str(path),
            received=str(error),
            fix=f"delete {path}; the run then goes on from the checkpoint before it",
        ) from error


def prune(folder: Path, keep_last: int, keep: Iterable[int] = ()) -> None:
    """Delete all but the newest ``keep_last``, the steps ``keep``, and what any of these calls the best so far.

    So a run that has to go back to an older one still finds the best that this one knows of.
    """
    steps = steps_in(folder)
    kept = {*steps[-keep_last:], *keep}
    kept |= {best for step in kept if (best := _best_of(path_of(folder, step))) is not None}
    for step in steps:
        if step not in kept:
            _delete(path_of(folder, step))
    for path in folder.glob(f"{_DAMAGED}step-*"):
        if steps and int(path.name.rsplit("-", 1)[1]) <= steps[-1]:
            _delete(path)


def drop(folder: Path, *, newer_than: int) -> None:
    """Delete the checkpoints of a way that was given up."""
    for step in steps_in(folder):
        if step > newer_than:
            _delete(path_of(folder, step))


def set_aside(folder: Path, *, newer_than: int) -> None:
    """Rename damaged checkpoints, so that they neither count among the last ones nor stand where a new one goes."""
    for step in steps_in(folder):
        if step > newer_than:
            path = path_of(folder, step)
            gone = path.with_name(f"{_DAMAGED}{path.name}")
            if gone.exists():
                _delete(gone)
            path.rename(gone)


def _delete(path: Path) -> None:
    """Rename first, so that a half-deleted one is never taken for whole."""
    gone = path.with_name(f"{_STAGING}old-{path.name}")
    path.rename(gone)
    shutil.rmtree(gone)


def _best_of(path: Path) -> int | None:
    """The step that was the best when this checkpoint was written, as far as it can be read."""
    try:
        best = json_reader.read(path / "state.json")["hooks"]["best"]["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return best if isinstance(best, int) else None


def random_state(device: str) -> dict[str, Any]:
    """The state of torch's generators, as JSON types."""
    out = {"cpu": _encode(torch.get_rng_state())}
    if device.startswith("cuda"):
        out["cuda"] = _encode(torch.cuda.get_rng_state(device))
    return out


def set_random_state(state: Mapping[str, str], device: str) -> None:
    """Put torch's generators back; a state of a device that is not used here is left alone."""
    torch.set_rng_state(_decode(state["cpu"]))
    if device.startswith("cuda") and "cuda" in state:
        torch.cuda.set_rng_state(_decode(state["cuda"]), device)


def _encode(value: torch.Tensor) -> str:
    return base64.b64encode(value.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _take_tensors(tree: Any, *, copy: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tree of containers without its tensors, and the tensors by name. Keys and tuples survive JSON."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = _copied(node) if copy else node
            return {"$tensor": name}
        if isinstance(node, Mapping):
            return {"$map": [[key, walk(value)] for key, value in node.items()]}
        if isinstance(node, tuple):
            return {"$tuple": [walk(value) for value in node]}
        if isinstance(node, list):
            return [walk(value) for value in node]
        return node

    return walk(tree), tensors


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU; a large one in memory of its own, which goes back to the system with it."""
    size = tensor.numel() * tensor.element_size()
    if size < LARGE:
        return tensor.detach().to("cpu", copy=True).contiguous()
    out = torch.frombuffer(mmap.mmap(-1, size), dtype=tensor.dtype).view(tensor.shape)
    return out.copy_(tensor.detach())


def _put_tensors(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_put_tensors(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    kind, value = next(iter(node.items()))
    if kind == "$tensor":
        return tensors[value]
    if kind == "$tuple":
        return tuple(_put_tensors(one, tensors) for one in value)
    return {key: _put_tensors(one, tensors) for key, one in value}
