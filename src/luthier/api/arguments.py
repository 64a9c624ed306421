"""What Ludwig's methods can be given and Luthier does not do: refused by name, or told, never ignored."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.api.model import Dataset
from luthier.errors import ConfigError, Fault, RunError
from luthier.registry import nearest
from luthier.types import SPLITS

SHOWN = 5  # runs that are named

# Ludwig's names of data formats -> the suffixes that Luthier reads them under
DATA_FORMATS: dict[str, tuple[str, ...]] = {
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "json": (".json",),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet", ".pq"),
    "excel": (".xlsx", ".xlsm"),
    "feather": (".feather",),
}


def refuse(name: str, value: Any, fix: str) -> None:
    """Raise for an argument that asks for something which Luthier does not do."""
    if value is not None:
        raise ConfigError([_refused(name, value, fix)])


def _refused(name: str, value: Any, fix: str) -> Fault:
    message, where = f"LudwigModel: {name}=… is not supported", f"LudwigModel {name}"
    return Fault("config-not-implemented", message, where, value, "None", fix)


def resumed(named: str) -> Path:
    """The folder of a run to go on with. Raises RunError run-not-a-run, with the runs nearby, where there is none."""
    folder = Path(named)
    if (folder / "run.json").is_file():
        return folder
    beside = folder.parent if folder.parent.is_dir() else Path()
    runs = sorted(one.name for one in beside.iterdir() if (one / "run.json").is_file())
    shown = [str(beside / one) for one in runs[-SHOWN:]]
    closest = nearest(folder.name, runs)
    new = "leave model_resume_path out to begin a new run"
    raise RunError(
        "run-not-a-run",
        "there is no run to go on with: " + ("the folder has no run.json" if folder.exists() else "no such folder"),
        where="LudwigModel train(model_resume_path=…)",
        received=str(folder),
        allowed=shown or f"the folder of a run; there is none in {beside.resolve()}",
        fix=f"did you mean {str(beside / closest)!r}? Else {new}" if closest else f"name the run's folder, or {new}",
    )


def refuse_machine(
    backend: Any, gpus: Any, memory_limit: Any, parallel_threads: bool, callbacks: Sequence[Any] | None
) -> None:
    """Raise for what would choose machines otherwise than the config does, with a fault for each argument."""
    named = backend.get("type", "local") if isinstance(backend, Mapping) else backend
    asked = (
        ("backend", None if named == "local" else named, "leave it out: one device of this machine is used"),
        ("gpus", gpus, "leave it out and set `execution.device` in the config, or CUDA_VISIBLE_DEVICES"),
        (
            "gpu_memory_limit",
            memory_limit,
            "set `execution.memory_limit` in the config, as a size such as 12GiB, not a share",
        ),
        ("callbacks", callbacks or None, "read metrics.jsonl in the run folder, or set trainer.track"),
    )
    if faults := [_refused(*one) for one in asked if one[1] is not None]:
        raise ConfigError(faults)
    if not parallel_threads:
        import torch

        torch.set_num_threads(1)


def check_asking(
    data_format: str | None, dataset: Dataset, skip_unprocessed: bool, return_type: Any, callbacks: Any
) -> None:
    """What `predict` and `evaluate` share with Ludwig's and do not do."""
    check_format(data_format, dataset)
    refuse("callbacks", callbacks or None, "read the returned frame")
    refuse("skip_save_unprocessed_output", None if skip_unprocessed else False, "there are no raw outputs; leave it")
    named = getattr(return_type, "__name__", return_type)
    if named not in (None, "DataFrame", "dataframe", "df"):
        refuse("return_type", named, "predictions are a pandas DataFrame; frame.to_dict('list') makes a dict of it")


def check_split(split: str) -> None:
    """Raise ConfigError for a split that no table has, in Ludwig's names or in ours."""
    if split not in ("full", "training", *SPLITS):
        raise ConfigError(
            "config-bad-value",
            "LudwigModel: eval_split is no split",
            where="eval_split",
            received=split,
            allowed=["full", "training", *SPLITS[1:]],
            fix='eval_split="test"',
        )


def check_format(data_format: str | None, dataset: Dataset) -> None:
    """Raise ConfigError when ``data_format`` says another format than ``dataset`` has, which is told by its suffix."""
    if data_format in (None, "auto") or dataset is None:
        return
    if isinstance(dataset, (str, Path)):
        fits = Path(dataset).suffix.lower() in DATA_FORMATS.get(data_format, ())
    else:
        fits = {"df": hasattr(dataset, "columns"), "dict": isinstance(dataset, Mapping)}.get(data_format, False)
    if not fits:
        raise ConfigError(
            "config-conflict",
            f"data_format={data_format!r} is not what the dataset is",
            received=str(dataset) if isinstance(dataset, (str, Path)) else type(dataset).__name__,
            allowed=["auto", *DATA_FORMATS, "df", "dict"],
            fix="leave data_format out: the format is told by the suffix",
        )


def warn_kept(**asked: bool) -> None:
    """Warn of what was asked to be left out and is a part of every run folder."""
    wanted = [name for name, value in asked.items() if value]
    if wanted:
        warnings.warn(
            f"{', '.join(wanted)}: a run folder always holds the model, its checkpoints and its metrics; "
            "delete what you do not need afterwards",
            UserWarning,
            stacklevel=3,
        )
