"""Run folders side by side: their state, their results, and the config keys and inputs in which they differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier import json_reader
from luthier.errors import RunError
from luthier.run.inputs import RECORD
from luthier.run.metrics import read_metrics

# Of what the lock holds a hash, and what that is called here.
HASHES = {"data_hash": "data", "base_hash": "base", "tokenizer_hash": "tokenizer", "template_hash": "template",
          "start_hash": "start"}  # fmt: skip
SHORT = 12  # characters of a hash that are shown

HEADINGS = ["run", "state", "base", "steps", "validation loss", "best", "adapter"]


@dataclass(frozen=True)
class RunSummary:
    """What one run folder says about itself."""

    path: str
    name: str
    state: str
    base: str
    steps: int | None
    validation_loss: float | None
    best_validation_loss: float | None
    adapter: str
    config: dict[str, Any] = field(repr=False)
    inputs: dict[str, str] = field(default_factory=dict, repr=False)  # what it was made from beside its config

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON types."""
        return asdict(self)

    def cells(self) -> list[str]:
        """The summary under `HEADINGS`."""

        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.4f}"

        steps = "-" if self.steps is None else str(self.steps)
        best = number(self.best_validation_loss)
        return [self.name, self.state, self.base, steps, number(self.validation_loss), best, self.adapter]


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys to values as JSON; an item of a list that has a name, such as a feature, is called by it."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        value = {f"[{item['name']}]": {key: inner for key, inner in item.items() if key != "name"} for item in value}
    if not isinstance(value, dict):
        return {prefix: json.dumps(value, ensure_ascii=False)}
    out: dict[str, str] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return out


def read(path: Path) -> RunSummary:
    """Summarise one run folder. Raises RunError when it is none."""
    try:
        record = json_reader.read(path / "run.json")
        if not isinstance(record, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise RunError(
            "run-not-a-run",
            "this folder holds no readable run.json",
            where=str(path),
            received=str(error),
            allowed="a folder with run.json",
            fix="name a folder that `luthier train` made, or one that holds such folders",
        ) from error
    lock = record.get("lock") or {}
    config = lock.get("config") or {}
    lines = read_metrics(path / "metrics.jsonl")
    validation = [line["loss"] for line in lines if line.get("split") == "validation"]
    adapter = config.get("adapter")
    return RunSummary(
        path=str(path),
        name=path.name,
        state=str(record.get("state", "unknown")),
        base=str(lock.get("base_name", "-")),
        steps=max((line["step"] for line in lines), default=None),
        validation_loss=validation[-1] if validation else None,
        best_validation_loss=min(validation, default=None),
        adapter=str(adapter.get("type")) if isinstance(adapter, dict) else "full",
        config=config,
        inputs=_inputs(path, lock),
    )


def _inputs(path: Path, lock: dict[str, Any]) -> dict[str, str]:
    """The table, base, tokenizer, template and versions that a run was made from, as far as it says."""
    try:
        known = json_reader.read(path / RECORD)
    except ValueError:  # it is not there, or not whole: the lock tells what differs
        known = {}
    known = known if isinstance(known, dict) else {}
    named = {"data.name": known.get("dataset"), "data.rows": known.get("rows"), "base.name": lock.get("base_name")}
    hashes = {f"{name}.hash": str(lock[key])[:SHORT] for key, name in HASHES.items() if lock.get(key)}
    versions = {f"versions.{name}": version for name, version in (lock.get("versions") or {}).items()}
    return {key: str(value) for key, value in (named | hashes | versions).items() if value is not None}


def is_run(path: Path) -> bool:
    """Whether a folder is a run itself."""
    return (path / "run.json").exists()


def summarise(paths: Sequence[Path]) -> list[RunSummary]:
    """The runs named by ``paths``; a folder that is no run itself stands for the runs directly in it."""
    found: list[RunSummary] = []
    for path in paths:
        if is_run(path) or not path.is_dir():
            found.append(read(path))
        else:
            found += [read(inner) for inner in sorted(path.iterdir()) if is_run(inner)]
    return found


def differences(runs: Sequence[RunSummary]) -> dict[str, list[str]]:
    """Config keys and inputs on which the runs do not agree, each with one value a run (`-` where it is absent).

    A key that is absent in one run and null in another makes no difference.
    """
    flat = [_flat(run.config) | run.inputs for run in runs]
    configured = {key for run in runs for key in _flat(run.config)}
    keys = sorted({key for one in flat for key in one}, key=lambda key: (key not in configured, key))
    rows = {key: [one.get(key, "-") for one in flat] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1 and not set(values) <= {"-", "null"}}
