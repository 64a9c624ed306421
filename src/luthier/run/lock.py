"""What a run was made from: the record that decides whether an output folder may be continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# What makes two runs the same run. Versions, machine and plan may differ; they lower the promise to rounding.
IDENTITY = ("config", "data_hash", "base_hash", "tokenizer_hash", "template_hash", "seed", "defaults", "start_hash")
# What a hash is of, in words.
HASHED = {
    "data_hash": "the columns or the rows of the dataset",
    "base_hash": "the files of the base model",
    "tokenizer_hash": "the tokenizer",
    "template_hash": "the prompt or chat template",
    "start_hash": "the checkpoint that the run starts from",
}

# Config keys that change where a run is written, tracked or how fast it is, never what is learned.
NOT_IDENTITY = frozenset({"name", "dataset", "backend", "execution"})
# The same in `trainer`: what is kept, who is told, what is done when a step fails.
NOT_IDENTITY_OF_TRAINER = frozenset(
    {"keep_last", "track", "on_nonfinite", "on_spike", "spike_window", "spike_threshold"}
)


@dataclass(frozen=True)
class Lock:
    """Everything that a result depends on. Hashes are sha256 in hex; ``config`` is fully resolved."""

    config_hash: str
    config: Mapping[str, Any]
    data_hash: str
    base_hash: str
    base_name: str
    tokenizer_hash: str
    template_hash: str
    seed: int
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    defaults: str = "luthier"
    start_hash: str = ""  # of the checkpoint that the run was forked from

    def to_json(self) -> dict[str, Any]:
        """The lock as JSON types."""
        return json.loads(json.dumps(asdict(self), default=_plain))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Lock:
        """A lock as `to_json` wrote it. Keys of a later version that this one does not know are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: inner for key, inner in value.items() if key in known})


def hash_config(config: Mapping[str, Any]) -> str:
    """sha256 of the parts of a resolved config that decide what is learned, whatever the order of its keys."""
    text = json.dumps(_identity(config), sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def diff(a: Lock, b: Lock, inside: Callable[[str], Sequence[str]] = lambda key: ()) -> list[str]:
    """One line for each thing in which two locks are different runs, ``a``'s value first; empty: the same run.

    ``inside``: more lines on what one of the hashes of `HASHED` is of, by its key.
    """
    left, right = a.to_json(), b.to_json()
    left["config"], right["config"] = _identity(left["config"]), _identity(right["config"])
    before, after = _flat(left, IDENTITY), _flat(right, IDENTITY)
    out = []
    for key in sorted(before.keys() | after.keys(), key=lambda key: (key not in HASHED, key)):
        if before.get(key) != after.get(key):
            what = f" ({HASHED[key]})" if key in HASHED else ""
            out.append(f"{key}: {_shown(key, before)} → {_shown(key, after)}{what}")
            out += [f"    {line}" for line in inside(key)] if key in HASHED else []
    return out


def _shown(key: str, values: Mapping[str, str]) -> str:
    value = values.get(key, "absent")
    return value.strip('"')[:12] or "none" if key in HASHED else value


def drift(a: Lock, b: Lock) -> list[str]:
    """One line for each difference that keeps the run the same but no longer bit for bit: versions, machine, plan."""
    before, after = (_flat(lock.to_json(), ("versions", "machine", "plan")) for lock in (a, b))
    return [
        f"{key}: {before.get(key, 'absent')} → {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    if isinstance(trainer := kept.get("trainer"), Mapping):
        kept["trainer"] = {key: value for key, value in trainer.items() if key not in NOT_IDENTITY_OF_TRAINER}
    if isinstance(given := kept.get("preprocessing"), Mapping):  # what is refused is not learned
        kept["preprocessing"] = {key: value for key, value in given.items() if key != "limits"}
    return kept


def _flat(value: Any, keys: tuple[str, ...] | None = None, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, Mapping):
        text = json.dumps(value, ensure_ascii=False)
        return {prefix: text if len(text) <= 80 else text[:79] + "…" + hashlib.sha256(text.encode()).hexdigest()[:8]}
    out: dict[str, str] = {}
    for key, inner in value.items():
        if keys is None or key in keys:
            out |= _flat(inner, None, f"{prefix}.{key}" if prefix else str(key))
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)
