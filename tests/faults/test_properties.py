"""Properties of what comes from outside: configs, rows, prompt templates, masks.

`make test-faults` tries 10,000 examples of each, `make test` a few (LUTHIER_EXAMPLES).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier import config
from luthier.config.prompt import Prompt
from luthier.data import columns, sources
from luthier.data.layout import Layout
from luthier.data.render import Dropped, Renderer
from luthier.data.render.template import parse
from luthier.errors import ConfigError, DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "data"))
from rendering_fixtures import byte_level, llama_style

EXAMPLES = int(os.environ.get("LUTHIER_EXAMPLES", "60"))
often = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
SLOW = 1.0  # seconds of this process that one config may take

ODD = ["1e-4", "no", "~", "0x1f", "007", "!!python/name:os.system", "*a", "&a x"]
NAMES = st.sampled_from([*config.Config.model_fields, "<<", "a"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.sampled_from(ODD)
)  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)
PARTS = [
    "a: 1", "a: &x [1]", "b: *x", "<<: *x", "- 1", "  - {c: 2}", "? k", "!!set {a}", "trainer:", "  epochs: 1e-4", "\t",
    "'", '"', "[", "{", "---", "...", "%YAML 1.1", "|", ">", "#", "base_model: x", "a: *x", "\x00", "\u2028", "e: .nan",
]  # fmt: skip
LINES = st.lists(st.sampled_from(PARTS), max_size=14).map("\n".join)


@often
@given(st.one_of(TREES.map(json.dumps), LINES, st.text(max_size=200)))
def test_yaml(text: str) -> None:
    """Any text is a config or a ConfigError, within a second."""
    began = time.process_time()
    try:
        config.load(config_file(text))
    except ConfigError as error:
        assert error.faults and all(fault.message for fault in error.faults)
    assert time.process_time() - began < SLOW


PLACE: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def _place(tmp_path_factory: pytest.TempPathFactory) -> None:
    PLACE[:] = [tmp_path_factory.mktemp("configs")]


def config_file(text: str) -> Path:
    path = PLACE[0] / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20))
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
ROW = st.dictionaries(st.sampled_from(["q", "a", "messages", " x ", ""]), VALUES, max_size=4)


@often
@given(st.lists(ROW, min_size=1, max_size=6))
def test_rows(rows: list[dict[str, Any]]) -> None:
    """Any rows are a table whose layout is told, or a DataError; text comes back as it was."""
    try:
        table = sources.read(rows)
        layout = columns.detect(table)
    except DataError:
        return
    assert set(layout.inputs) <= set(table.columns)
    for at, row in enumerate(rows):
        back = table.row(at)
        assert all(back[name] == value for name, value in row.items() if isinstance(value, str) and name in back)


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
GOOD = ["{a}", "{b}", "{{", "}}", "text ", "\n", "%s", "$a", "[0]", "!r", "(7*7)"]
BAD = [
    "{a.b}", "{a[0]}", "{a!r}", "{a:>200000000}", "{a:{b}}", "{0}", "{}", "{__class__}", "{a.__init__.__globals__}",
    "{c}", "{ a.real }", "{a:%d}", "{a:99999}", "{a!s:>9}",
]  # fmt: skip


@often
@given(st.lists(st.sampled_from(GOOD), max_size=8), TEXT, TEXT)
def test_prompt_templates_write_the_text_of_their_columns(pieces: list[str], a: str, b: str) -> None:
    """Nothing but that: what stands in a row is never evaluated, literal braces are usable."""
    written = {"{a}": a, "{b}": b, "{{": "{", "}}": "}"}
    made = parse("".join(pieces), ["a", "b"])
    assert made.render({"a": a, "b": b}).text == "".join(written.get(piece, piece) for piece in pieces)


@often
@given(st.lists(st.sampled_from(GOOD), max_size=4), st.sampled_from(BAD), st.lists(st.sampled_from(GOOD), max_size=4))
def test_prompt_templates_with_anything_else_are_refused(before: list[str], bad: str, after: list[str]) -> None:
    """Attributes, indices, conversions, nested and wide formats, unknown names: wherever they stand."""
    with pytest.raises(DataError) as caught:
        parse("".join([*before, bad, *after]), ["a", "b"])
    assert caught.value.code in ("data-template", "data-missing-column")


@often
@given(st.text(st.sampled_from("{}ab.[]!:>0 %$"), max_size=24), TEXT)
def test_any_text_is_a_template_or_refused(source: str, a: str) -> None:
    """And what it writes is bounded by what it and the row hold."""
    try:
        text = parse(source, ["a", "b"]).render({"a": a, "b": a}).text
    except DataError:
        return
    assert len(text) <= len(source) + source.count("{") * max(len(a), 100)


HAZARDS = st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<s>", "</s>", "{a}", " ", "\n", "ü", "a"])
NASTY = st.lists(st.one_of(HAZARDS, TEXT), max_size=4).map("".join)
TOKENIZERS = {"chat": byte_level(), "bytes": byte_level(None), "llama": llama_style()}
LAYOUT = Layout("instruction", ("a", "b"), "y")


@pytest.mark.parametrize("name", TOKENIZERS)
@often
@given(NASTY, NASTY, NASTY)
def test_masks(name: str, a: str, b: str, y: str) -> None:
    """The prompt's tokens are not trained, the answer's all are, its end is, and no row spells a control token."""
    tokenizer = TOKENIZERS[name]
    renderer = Renderer(LAYOUT, Prompt.model_validate({"template": "{a} | {b}"}), tokenizer, preprocessing=None)
    found = renderer.examples({"a": a, "b": b, "y": y}, 0)
    if isinstance(found, Dropped):
        assert not y.strip()
        return
    (example,) = found
    prompt = list(renderer.prompt({"a": a, "b": b}).ids)
    assert list(example.ids[: len(prompt)]) == prompt
    trained = [bool(weight) for weight in example.weights]
    assert trained == [False] * len(prompt) + [True] * (example.length - len(prompt))
    ends = set(tokenizer.eos_ids)
    assert example.ids[-1] in ends and not ends & set(example.ids[len(prompt) : -1])
