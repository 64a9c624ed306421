"""Names in a config that only data and base can judge: the metric that is watched, the layers that are adapted.

A name that stands for nothing is refused before a weight is loaded, not after the epoch that would have needed it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from shutil import which
from typing import Any

from luthier.assets.adapter_files import no_butterflies
from luthier.assets.spec import modules
from luthier.config import Boft, Config
from luthier.data.layout import Layout
from luthier.errors import AssetError, ConfigError, Fault, missing_extra
from luthier.metrics import DEFAULT_CLASS, DEFAULT_TEXT, available
from luthier.plan.support import Engine, not_decoder
from luthier.registry import nearest
from luthier.types import Base

MEASURED = ("loss", "perplexity", "supervised_tokens", "token_accuracy")  # what an evaluation gives for any target
COUNTS = frozenset({"supervised_tokens"})  # of these: what says how much was measured, not how well it went
PROJECTION = re.compile(r".*\.layers\.\d+\.\w+\.\w+_proj")  # what the decoder puts an adapter beside


def check_trackers(settings: Config) -> None:
    """Raise DependencyError for a tracker whose package is not installed, before any work."""
    for name in settings.trainer.track:
        if find_spec(name) is None:
            raise missing_extra(name, "track", f"trainer.track: [{name}]")


def check_metrics(settings: Config, layout: Layout) -> None:
    """Raise ConfigError for a metric that decides and that no evaluation of this target gives, or that is a count."""
    trainer = settings.trainer
    schedule = trainer.learning_rate_scheduler
    generated = available(DEFAULT_CLASS if layout.classes else DEFAULT_TEXT)
    measured = [name for name in MEASURED if name not in COUNTS]
    validated = [*measured, *(generated if layout.kind != "text" and trainer.eval_generation_rows != 0 else [])]
    trained = measured if trainer.evaluate_training_set else ["loss"]
    asked = {"validation_metric": (trainer.validation_metric, validated)}
    if schedule.reduce_on_plateau:
        there = trained if schedule.reduce_eval_split == "training" else validated
        asked["learning_rate_scheduler.reduce_eval_metric"] = (schedule.reduce_eval_metric, there)
    faults = [
        Fault(
            "config-bad-value",
            f"{metric!r} counts: no model is better for it"
            if metric in COUNTS
            else f"evaluation does not give {metric!r}",
            f"trainer.{key}",
            metric,
            there,
            (None if metric in COUNTS else _meant(metric, there)) or f"{key.rpartition('.')[2]}: loss",
        )
        for key, (metric, there) in asked.items()
        if metric not in there
    ]
    if faults:
        raise ConfigError(faults)


def check_butterflies(settings: Config, device: str, here: bool = True) -> None:
    """Raise AssetError for factors of BOFT that a device cannot compute; ``here``: as far as is known before the base.

    PEFT compiles what they need when the adapter is made, and would go on without them.
    """
    adapter = settings.adapter
    if not isinstance(adapter, Boft) or adapter.boft_n_butterfly_factor == 1:
        return
    if not device.startswith("cuda"):
        raise no_butterflies(adapter.boft_n_butterfly_factor, f"training is on the {device}")
    if here and which("ninja") is None:
        raise no_butterflies(adapter.boft_n_butterfly_factor, "ninja is not installed")


def check_layers(settings: Config, base: Base, engine: Engine) -> None:
    """Raise AssetError for layers that the base has not: their numbers, and target_modules of a known architecture."""
    adapter = settings.adapter
    _check_numbers(adapter, base)
    declared = None if adapter is None or adapter.pretrained_adapter_weights else adapter.target_modules
    if declared in (None, "all-linear") or base.spec.architecture not in engine.architectures:
        return
    there = [*modules(base.path), "lm_head"]
    if not_decoder(settings, base.spec, engine) is None and settings.execution.model != "generic":
        there = [name for name in there if PROJECTION.fullmatch(name)]
    if isinstance(declared, str):
        unknown = [] if any(re.fullmatch(declared, name) for name in there) else [declared]
    else:
        unknown = [name for name in declared if not any(f".{one}".endswith(f".{name}") for one in there)]
    short = sorted({name.rpartition(".")[2] for name in there})
    faults = [
        Fault(
            "asset-unsupported",
            f"no layer of {base.name} that can be adapted is named {name!r}",
            "adapter.target_modules",
            name,
            short,
            _meant(name, short) or "name its layers, or leave target_modules out for all linear ones",
        )
        for name in unknown
    ]
    if faults:
        raise AssetError(faults)


def _check_numbers(adapter: Any, base: Base) -> None:
    if adapter is None or adapter.pretrained_adapter_weights:
        return
    numbers = getattr(adapter, "layers_to_transform", None)
    absent = [] if numbers is None else [number for number in numbers if not 0 <= number < base.spec.layers]
    if absent or numbers == ():
        raise AssetError(
            "asset-unsupported",
            f"{base.name} has no layer {', '.join(map(str, absent))}" if absent else "no layer would be adapted",
            where="adapter.layers_to_transform",
            received=list(numbers or ()),
            allowed=f"numbers from 0 to {base.spec.layers - 1}",
            fix="name its layers by these numbers, or leave layers_to_transform out for all of them",
        )


def _meant(name: str, known: Sequence[str]) -> str | None:
    close = nearest(name, known)
    return f"did you mean {close!r}?" if close else None
