"""The generated reference and JSON Schema are complete, and the committed files are not stale."""

from __future__ import annotations

import json
from pathlib import Path

import luthier.config as package
from luthier.config import Config, json_schema, reference_markdown
from luthier.config.section import Section

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


def test_the_schema_forbids_unknown_keys_and_notes_ludwig():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Lora"]["properties"]["r"]["ludwig"] == 8
    assert schema["$defs"]["Trainer"]["properties"]["epochs"]["ludwig"] == 100
    assert set(schema["properties"]) == set(Config.model_fields)
