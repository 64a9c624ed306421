"""Whether what a run serves is what it trained: its model, file by file, against the sums that training wrote."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from luthier import events
from luthier.assets.cache import remembered_hash, writable_cache
from luthier.config import Config
from luthier.errors import ConfigError, Fault, RunError
from luthier.run import Lock, RunFolder, manifest, verify

LARGE = 64 * 2**20  # bytes from which on a file is hashed once and remembered; smaller ones take less than a moment
# keys of an adapter that say how it is trained, not what it is
OF_TRAINING = {"dropout", "init_rows", "loraplus_lr_ratio", "postprocessor", "pretrained_adapter_weights"}


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


def require_same_adapter(run: RunFolder, lock: Lock, settings: Config) -> None:
    """Raise ConfigError where the run's config, edited or overridden, describes another adapter than was trained."""
    if "adapter" not in lock.config:
        return
    trained, now = lock.config["adapter"] or {}, settings.to_dict()["adapter"] or {}
    names = sorted((trained.keys() & now.keys() if trained and now else trained.keys() | now.keys()) - OF_TRAINING)
    faults = [
        Fault("config-conflict", "this is not the adapter that was trained", f"adapter.{name} of {run.path}",
              now.get(name), str(trained.get(name)), "put it back in config.yaml; other keys may be overridden")
        for name in names if trained.get(name) != now.get(name)
    ]  # fmt: skip
    if faults:
        raise ConfigError(faults)


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
