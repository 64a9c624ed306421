"""The config: YAML or a dict becomes one frozen, checked `Config`. The only place where defaults stand. No torch."""

from __future__ import annotations

import io
from typing import Any

from luthier.config.adapter import AdaLora, Adapter, BaseAdapter, Boft, Ia3, LnTuning, Loha, Lokr, Lora, Oft, Vera
from luthier.config.backend import Backend
from luthier.config.defaults import Filled
from luthier.config.describe import markdown, schema_of
from luthier.config.execution import Execution, size_bytes
from luthier.config.features import Decoder, Feature, FeaturePreprocessing, Match
from luthier.config.generation import Generation
from luthier.config.loading import load
from luthier.config.model_parameters import ModelParameters, RopeScaling
from luthier.config.optimizer import GradientClipping, Optimizer
from luthier.config.preprocessing import Preprocessing, SplitConfig
from luthier.config.prompt import Prompt
from luthier.config.quantization import Quantization
from luthier.config.schedule import Schedule
from luthier.config.schema import Config, with_features
from luthier.config.trainer import Trainer


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a config file, for editors. ``ludwig`` notes Ludwig's default of a key."""
    return schema_of(Config)


def reference_markdown() -> str:
    """The reference page of every key, ``docs/reference/config.md``."""
    return markdown(Config)


def dump_yaml(config: Config) -> str:
    """Every key with its value as YAML; `load` of it gives an equal config."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 4096
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    out = io.StringIO()
    yaml.dump(config.to_dict(), out)
    return out.getvalue()


__all__ = [
    "AdaLora",
    "Adapter",
    "Backend",
    "BaseAdapter",
    "Boft",
    "Config",
    "Decoder",
    "Execution",
    "Feature",
    "FeaturePreprocessing",
    "Filled",
    "Generation",
    "GradientClipping",
    "Ia3",
    "LnTuning",
    "Loha",
    "Lokr",
    "Lora",
    "Match",
    "ModelParameters",
    "Oft",
    "Optimizer",
    "Preprocessing",
    "Prompt",
    "Quantization",
    "RopeScaling",
    "Schedule",
    "SplitConfig",
    "Trainer",
    "Vera",
    "dump_yaml",
    "json_schema",
    "load",
    "reference_markdown",
    "size_bytes",
    "with_features",
]
