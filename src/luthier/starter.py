"""`luthier init`: from a table and a machine to a commented config to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import events
from luthier.assets.catalogue import Proposal, propose
from luthier.data.columns import Layout, detect
from luthier.data.language import language_of
from luthier.data.sources import read
from luthier.data.table import Table
from luthier.plan.machine import probe
from luthier.run import atomic

CHARACTERS_PER_TOKEN = 3.5  # a rule of thumb for a first look; `luthier check` counts real tokens


@dataclass(frozen=True)
class Started:
    """What `init` wrote and why."""

    path: Path
    text: str
    lines: tuple[str, ...]
    proposals: tuple[Proposal, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON types."""
        bases = [{"name": p.candidate.name, "licence": p.candidate.licence, "reason": p.reason} for p in self.proposals]
        return {"config": str(self.path), "found": list(self.lines), "bases": bases}


def write_config(
    data: str,
    output: Path,
    *,
    inputs: Sequence[str] | None = None,
    target: str | None = None,
    base: str | None = None,
    encoding: str | None = None,
    sink: events.Sink = events.silent,
) -> Started:
    """Read ``data``, detect its layout, propose bases and write a config to ``output``."""
    table = read(data, encoding=encoding, sink=sink)
    layout = detect(table, inputs=inputs, target=target)
    text_columns = [*layout.inputs, *([layout.target] if layout.target else [])]
    language = language_of(table, text_columns)
    task = "classification" if layout.classes else layout.kind
    proposals = propose(language, len(table), _longest_tokens(table, text_columns), task, probe())
    chosen = base or proposals[0].candidate.name
    dataset = Path(data)
    shown = str(dataset.resolve()) if dataset.exists() and dataset.parent.resolve() != output.parent.resolve() else data
    if dataset.exists() and dataset.parent.resolve() == output.parent.resolve():
        shown = dataset.name
    text = _compose(chosen, shown, layout, proposals, encoding)
    atomic.write_text(output, text)
    lines = (*table.notes, *layout.explanation, f"{len(table):,} rows, language: {language}")
    return Started(output, text, lines, tuple(proposals))


def _longest_tokens(table: Table, columns: Sequence[str], sample: int = 2000) -> int:
    rows = (table.row(i) for i in range(min(len(table), sample)))
    longest = max((sum(len(str(row.get(c) or "")) for c in columns) for row in rows), default=0)
    return int(longest / CHARACTERS_PER_TOKEN) + 1


def _quote(text: str) -> str:
    """A YAML double-quoted scalar; JSON's string is one."""
    import json

    return json.dumps(text, ensure_ascii=False)


def _compose(base: str, dataset: str, layout: Layout, proposals: Sequence[Proposal], encoding: str | None) -> str:
    others = "\n".join(f"#   {p.candidate.name}: {p.reason}" for p in proposals)
    guess = "   # a guess: say it with --input and --target" if layout.is_guess else ""
    out = [
        "# Written by `luthier init`. Every key: docs/reference/config.md, or `luthier schema` for your editor.",
        "# Base models that fit this data and this machine, first choice first:",
        others,
        f"base_model: {_quote(base)}",
        f"dataset: {_quote(dataset)}",
        "",
        f"# What was found in the table: {layout.kind}{guess}",
    ]
    if layout.kind not in ("chat", "text") and layout.target:
        kind = "category" if layout.classes else "text"
        out.append("input_features:")
        out += [f"  - {{name: {_quote(name)}, type: text}}" for name in layout.inputs]
        out += ["output_features:", f"  - {{name: {_quote(layout.target)}, type: {kind}}}"]
        body = "\n".join(f"    ### {name}:\n    {{{name}}}\n" for name in layout.inputs)
        out += ["prompt:", "  # Plain {column} fields; what is around them is yours to write.", "  template: |"]
        out += [body + f"    ### {layout.target}:"]
    if encoding:
        out += ["preprocessing:", f"  encoding: {encoding}"]
    out += [
        "",
        "adapter:",
        "  type: lora          # null trains all weights",
        "# quantization:",
        "#   bits: 4           # when the base does not fit otherwise",
        "",
        "trainer:",
        "  type: finetune",
        "  epochs: 3",
        "  batch_size: 16      # rows of one optimizer step (times gradient_accumulation_steps)",
        "  learning_rate: 2e-4",
        "",
        "generation:",
        "  max_new_tokens: 256",
        "",
    ]
    return "\n".join(out)
