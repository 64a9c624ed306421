"""The generated reference and JSON Schema are complete, and the committed files are not stale."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import luthier.config as package
from luthier.config import Config, json_schema, reference_markdown
from luthier.config.adapter import Lora
from luthier.config.optimizer import GradientClipping, Optimizer
from luthier.config.schedule import Schedule
from luthier.config.section import Section
from luthier.config.trainer import Trainer

DOCS = Path(__file__).parents[3] / "docs" / "reference"


def test_committed_reference_is_fresh():
    assert (DOCS / "config.md").read_text(encoding="utf-8") == reference_markdown()


def test_committed_schema_is_fresh():
    assert json.loads((DOCS / "schema.json").read_text(encoding="utf-8")) == json_schema()


def sections() -> list[type[Section]]:
    return [v for v in vars(package).values() if isinstance(v, type) and issubclass(v, Section)]


def test_every_key_is_described_and_in_the_reference():
    page = reference_markdown()
    assert len(sections()) > 20
    for section in sections():
        for name, field in section.model_fields.items():
            assert field.description and field.description.endswith((".", ")")), (section.__name__, name)
            assert f"| `{name}` |" in page, (section.__name__, name)


# What decides how well a model learns where the user is silent.
DECISIVE = {
    Lora: ("target_modules", "r", "alpha", "dropout"),
    Trainer: ("learning_rate", "epochs", "batch_size", "loss_normalization"),
    Optimizer: ("type", "betas", "eps", "weight_decay"),
    Schedule: ("decay", "warmup_fraction"),
    GradientClipping: ("clipglobalnorm",),
}
NAMED = re.compile(r"arXiv \d{4}\.\d{4,5}|\b(19|20)\d\d\b|documentation|guide|our own choice, because .+")


@pytest.mark.parametrize(("section", "name"), [(s, n) for s, names in DECISIVE.items() for n in names])
def test_the_reference_names_the_source_of_a_default_that_decides(section: type[Section], name: str):
    source = (section.model_fields[name].json_schema_extra or {}).get("source", "")
    assert NAMED.search(source), f"{section.__name__}.{name} says no source"
    rows = [row for row in reference_markdown().splitlines() if row.startswith(f"| `{name}` |")]
    assert any(f"Source: {source}. |" in row for row in rows)


def test_the_schema_forbids_unknown_keys_and_notes_ludwig():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Lora"]["properties"]["r"]["ludwig"] == 8
    assert schema["$defs"]["Trainer"]["properties"]["epochs"]["ludwig"] == 100
    assert set(schema["properties"]) == set(Config.model_fields)
