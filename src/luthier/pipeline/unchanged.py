"""Whether what a run serves is what it trained: its model, file by file, against the sums that training wrote."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from luthier import events
from luthier.assets.cache import remembered_hash, writable_cache
from luthier.config import Config
from luthier.errors import ConfigError, Fault, RunError
from luthier.run import Lock, RunFolder, manifest, verify

LARGE = 64 * 2**20  # bytes from which on a file is hashed once and remembered; smaller ones take less than a moment
# keys that say how an adapter is trained, not what it is
OF_TRAINING = {"dropout", "init_rows", "loraplus_lr_ratio", "postprocessor", "pretrained_adapter_weights"}
OF_TRAINING |= {"neftune_noise_alpha"}  # of model_parameters


def require_unchanged(run: RunFolder, sink: events.Sink = events.silent) -> None:
    """Raise RunError run-damaged where a file of a run's trained model is not the one that training wrote.

    A run of a version that wrote no sums cannot be checked, which is told.
    """
    if not verify.has_sums(run):
        told = (
            f"{run.model_path} has no {manifest.NAME}, as older versions left it: whether it has changed is not known"
        )
        sink(events.Warned(text=told))
        return
    if run.adapter.is_dir() and run.weights.is_dir():
        raise _damaged(
            run.path, run.path, [f"there are both {run.adapter.name}/ and {run.weights.name}/, and it made one of them"]
        )
    assert run.model_path is not None, "a run that is loaded has a model"
    require_whole(run.model_path, run.record.get(verify.RECORDED))


def require_same_model(run: RunFolder, lock: Lock, settings: Config, sink: events.Sink = events.silent) -> None:
    """Raise ConfigError where the run's config, edited or overridden, describes another model than was trained.

    Another quantization of the base is told alone: its weights are the same but for what rounding takes.
    """
    now = settings.to_dict()
    faults = [
        Fault("config-conflict", f"this is not the {what} that was trained", f"{section}.{name} of {run.path}",
              "None" if after is None else after, str(before),
              "put it back in config.yaml; other keys may be overridden")
        for section, what in (("adapter", "adapter"), ("model_parameters", "model"))
        for name, before, after in _differences(lock.config, now, section)
    ]  # fmt: skip
    if faults:
        raise ConfigError(faults)
    if changed := _differences(lock.config, now, "quantization"):
        was, is_now = (
            ", ".join(f"{name}: {values[at]}" for name, *values in changed) if section else "none"
            for at, section in enumerate((lock.config["quantization"], now["quantization"]))
        )
        told = f"the base is not held as in the training: quantization was ({was}) and is ({is_now})"
        sink(events.Warned(text=f"{told}; answers may differ from those of the training"))


def _differences(trained: Mapping[str, Any], now: Mapping[str, Any], section: str) -> list[tuple[str, Any, Any]]:
    """Key, value of the training and value now, where they differ. What the training did not know is no difference."""
    if section not in trained:
        return []
    before, after = trained[section] or {}, now[section] or {}
    names = sorted((before.keys() & after.keys() if before and after else before.keys() | after.keys()) - OF_TRAINING)
    return [(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]


def require_whole(folder: Path, known: str | None = None) -> None:
    """Raise RunError run-damaged where a file of ``folder`` is not as its manifest says.

    ``known``: the sha256 of the manifest itself, where that is recorded.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        faults = verify.faults_of(folder, known, sum_of=_hash_of, each=pool.map)
    if faults:
        raise _damaged(folder, folder.parent, faults)


def _damaged(folder: Path, run: Path, faults: list[str]) -> RunError:
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return RunError(
        "run-damaged", f"this is not the model that was trained: {faults[0]}{more}", where=str(folder),
        received="; ".join(faults[:5]), allowed="the files that training wrote",
        fix=f"restore them from a copy or a mirror, or train again; `luthier runs verify {run}` reads all there is",
    )  # fmt: skip


def _hash_of(path: Path) -> str:
    cache = writable_cache() if path.stat().st_size >= LARGE else None
    return manifest.hash_of(path) if cache is None else remembered_hash(path, cache)
