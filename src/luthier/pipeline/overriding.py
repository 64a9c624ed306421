"""Keys of a run's config that are overridden where its model answers: those that mean nothing there are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier import config
from luthier.config import Config
from luthier.infer.sampling import resolve

# Sections and keys on which answers, or the rows that are read to be answered, depend. What makes another model of
# adapter, model_parameters and base_model is refused before (`unchanged`).
ACTING = (
    "base_model", "defaults", "execution", "generation", "input_features", "output_features", "quantization",
    "preprocessing.limits", "preprocessing.redact", "preprocessing.sheet", "preprocessing.split",
    "prompt.chat_template", "prompt.system", "prompt.task", "prompt.template",
    "trainer.eval_batch_size", "trainer.precision", "trainer.use_mixed_precision",
)  # fmt: skip
SEED = "random_seed"
# What decides how training rows are cut or which of their tokens are trained, never what is asked.
OF_TRAINING_ROWS = {"prompt": ("train_on",),
                    "preprocessing": ("truncation", "max_sequence_length", "global_max_sequence_length")}  # fmt: skip


def idle(declared: Config, settings: Config) -> list[str]:
    """What to tell of keys that ``settings`` changes in a run's config and that do not touch what its model answers."""
    before, after = _flat(declared.to_dict()), _flat(settings.to_dict())
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    vain = [key for key in changed if key != SEED and not any(f"{key}.".startswith(f"{one}.") for one in ACTING)]
    out = []
    if vain:
        keys = ", ".join(vain[:5]) + (f" and {len(vain) - 5} more" if len(vain) > 5 else "")
        out = [f"{keys}: of no effect, because the run is trained. What acts on its answers: {', '.join(ACTING)}"]
    if SEED in changed:
        drawn = resolve(settings.generation)
        if not drawn.do_sample or drawn.temperature == 0:
            out.append(f"{SEED}: of no effect while answers are greedy (generation.temperature is 0)")
    return out


def asked_as_trained(settings: Config, trained: Mapping[str, Any]) -> Config:
    """``settings`` with all that only training rows know as it was in ``trained``, the config of the run's lock."""
    now = settings.to_dict()
    for section, names in OF_TRAINING_ROWS.items():
        was = trained.get(section) or {}
        now[section].update({name: was[name] for name in names if name in was})
    return config.load(now, file=settings.file)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return out
