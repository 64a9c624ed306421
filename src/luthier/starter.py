"""`luthier init`: from a table and a machine to a commented config to start from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import events
from luthier.assets import licences
from luthier.assets.catalogue import Proposal, judge, known, propose
from luthier.config import load
from luthier.data.columns import detect, one_answer
from luthier.data.conversation import conversation
from luthier.data.language import recognised
from luthier.data.layout import Layout
from luthier.data.render import template
from luthier.data.sources import read
from luthier.data.table import Table
from luthier.errors import DataError
from luthier.plan.machine import probe
from luthier.run import atomic

# Rules of thumb for a first look; `luthier check` counts real tokens.
CHARACTERS_PER_TOKEN = 3.5
SAMPLE = 2000  # rows that are looked at
DENSE = {"ja": 1.2, "zh": 1.2, "ko": 1.2, "th": 1.5}  # scripts whose characters are nearly tokens each


@dataclass(frozen=True)
class Started:
    """What `init` wrote and why."""

    path: Path
    text: str
    notes: tuple[str, ...]  # of the table, told when it was read
    lines: tuple[str, ...]
    proposals: tuple[Proposal, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON types."""
        bases = [
            {
                "name": p.candidate.name,
                "parameters": p.candidate.parameters,
                "languages": list(p.candidate.languages),
                "context": p.candidate.context,
                "download_gb": p.candidate.download,
                "licence": p.candidate.licence,
                "gated": p.candidate.gated,
                "terms": p.candidate.terms,
                "bits": p.bits,
                "fits": p.fits,
                "reason": p.reason,
            }
            for p in self.proposals
        ]
        return {"config": str(self.path), "found": [*self.notes, *self.lines], "bases": bases}


def write_config(
    data: str,
    output: Path,
    *,
    inputs: Sequence[str] | None = None,
    target: str | None = None,
    base: str | None = None,
    encoding: str | None = None,
    sets: Sequence[str] = (),
    sink: events.Sink = events.silent,
) -> Started:
    """Read ``data``, detect its layout, propose bases and write a config to ``output``."""
    table = read(data, encoding=encoding, sink=sink)
    layout = detect(table, inputs=inputs, target=target)
    text_columns = [*layout.inputs, *([layout.target] if layout.target else [])]
    language, guessed = recognised(table, text_columns)
    task = "classification" if layout.classes else layout.kind
    density = DENSE.get(language, CHARACTERS_PER_TOKEN)
    longest = int(_longest(table, text_columns) / density) + 1
    machine = probe()
    calls = layout.kind == "chat" and _holds_calls(table, layout)
    proposals = propose(language, len(table), longest, task, machine, calls=calls)
    chosen = base or proposals[0].candidate.name
    entry = known(chosen)
    judged = judge(entry, language, longest, machine, calls=calls) if entry is not None else None
    bits = judged.bits if judged is not None else None
    answer = int(_longest(table, [layout.target] if layout.target else []) / density)
    room = max(32, -(-int(answer * 1.5) // 32) * 32)
    made = _compose(chosen, bits, _shown(data, output), layout, proposals, encoding, room)
    text = _with_overrides(made, sets) if sets else made
    load(text)  # what is written can be read
    atomic.write_text(output, text)
    said = f"{language} (a guess by a few words and the headings)" if guessed else language or "not recognised"
    lines = [*layout.explanation, f"{len(table):,} rows, language: {said}"]
    if same := one_answer(table, layout):
        lines.append(f"WARNING: {same}")
    if judged is not None:
        lines += _warnings(judged, language, "" if base is None else proposals[0].candidate.name, calls=calls)
    elif base is not None and (terms := licences.of_folder(Path(base).expanduser())):
        lines.append(f"{base}: {terms}")
    return Started(output, text, tuple(table.notes), tuple(lines), tuple(proposals))


def _holds_calls(table: Table, layout: Layout) -> bool:
    """Whether an answer of the first rows calls a tool; rows that cannot be understood are told by `check`."""
    for index in range(min(len(table), SAMPLE)):
        try:
            turns = conversation(table.row(index), layout)
        except DataError:
            continue
        if any(turn.tool_calls for turn in turns):
            return True
    return False


def _warnings(chosen: Proposal, language: str, better: str, *, calls: bool) -> list[str]:
    """What speaks against the chosen base; ``better`` is the first choice in place of one that the user named."""
    candidate = chosen.candidate
    instead = f"; the first choice for this table: {better}" if better not in ("", candidate.name) else ""
    lines = []
    if language and candidate.speaks(language) is False:
        lines.append(f"WARNING: {candidate.name} was NOT trained on {language}{instead}")
    elif language and candidate.speaks(language) is None:
        lines.append(f"WARNING: {candidate.name} may not know {language}: its card does not name it{instead}")
    if calls and not candidate.calls:
        lines.append(f"WARNING: {candidate.name}: its chat template is not known to write tool calls{instead}")
    if not chosen.fits:
        lines.append(
            f"WARNING: {candidate.name} does not fit into the memory that is free here, not even in 4 bits{instead}"
        )
    if candidate.terms:
        lines.append(f"{candidate.name}: {candidate.terms}")
    return lines


def _heading(proposals: Sequence[Proposal]) -> str:
    """What the list of proposals may call itself."""
    if all(p.fits for p in proposals):
        return "Base models that fit this data and this machine, first choice first:"
    if proposals[0].fits:
        return "Base models for this data, first choice first (each says whether it fits this machine):"
    return "Base models for this data. NONE that knows its language fits the memory that is free here:"


def _shown(data: str, output: Path) -> str:
    """The dataset as the config names it: relative when it lies beside the config, else where it is."""
    dataset = Path(data)
    if not dataset.exists():
        return data
    return dataset.name if dataset.parent.resolve() == output.parent.resolve() else str(dataset.resolve())


def _longest(table: Table, columns: Sequence[str], sample: int = SAMPLE) -> int:
    """Characters of the longest of the first rows, over these columns."""
    rows = (table.row(i) for i in range(min(len(table), sample)))
    return max((sum(len(str(row.get(c) or "")) for c in columns) for row in rows), default=0)


def _with_overrides(text: str, sets: Sequence[str]) -> str:
    """The config with keys set as ``--set`` says, comments kept. Raises ConfigError as a faulty override does."""
    from io import StringIO

    import ruamel.yaml

    yaml = ruamel.yaml.YAML()
    yaml.width = 10_000
    tree = yaml.load(text)
    load(tree, sets)
    for one in sets:
        path, _, value = one.partition("=")
        *parents, last = [int(part) if part.isdigit() else part for part in path.strip().split(".")]
        node = tree
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
        node[last] = ruamel.yaml.YAML(typ="safe", pure=True).load(value)
    out = StringIO()
    yaml.dump(tree, out)
    return out.getvalue()


def _quote(text: str) -> str:
    """A YAML double-quoted scalar; JSON's string is one, with what YAML does not print escaped."""
    return "".join(_escape(c) for c in json.dumps(text, ensure_ascii=False))


def _escape(character: str) -> str:
    code = ord(character)
    return character if character.isprintable() else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _can_name(name: str, target: str | None) -> bool:
    """Whether ``{name}`` in a template is this column: a colon or brackets may make it something else."""
    try:
        return template.parse(f"{{{name}}}", [name], target=target).fields == (name,)
    except DataError:
        return False


def _prompt(layout: Layout) -> list[str]:
    """The section `prompt`: the system prompt, then each input under its heading."""
    columns = [*([layout.system] if layout.system else []), *layout.inputs]
    if unnamed := [name for name in columns if not _can_name(name, layout.target)]:
        shown = ", ".join(map(_quote, unnamed))
        return [
            f"# No prompt.template: {shown} cannot be named in one (rename the column to do so). Rows are written with",
            "# the base model's chat template, or as a line `name: value` for each input.",
        ]
    inputs = "".join(f"### {_literal(name)}:\n{{{name}}}\n\n" for name in layout.inputs)
    written = (f"{{{layout.system}}}\n\n" if layout.system else "") + inputs + f"### {_literal(layout.target or '')}:\n"
    lines = written.split("\n")[:-1]
    is_block = all(line.isprintable() for line in lines) and not any("\n" in name for name in columns)
    indented = ["  template: |", *(f"    {line}".rstrip() for line in lines)]
    body = indented if is_block else [f"  template: {_quote(written)}"]
    return ["prompt:", "  # Plain {column} fields; what is around them is yours to write.", *body]


def _literal(name: str) -> str:
    """A heading as text of a template, on one line."""
    return " ".join(name.split()).replace("{", "{{").replace("}", "}}")


def _compose(
    base: str,
    bits: int | None,
    dataset: str,
    layout: Layout,
    proposals: Sequence[Proposal],
    encoding: str | None,
    room: int,
) -> str:
    """The file; ``room`` is the tokens that an answer may take."""
    others = "\n".join(f"#   {p.candidate.name}: {p.reason}" for p in proposals)
    guess = " (a guess: say it with --input and --target)" if layout.is_guess else ""
    found = f"classification, {len(layout.classes)} answers" if layout.classes else layout.kind
    out = [
        "# Written by `luthier init`. Every key: docs/reference/config.md, or `luthier schema` for your editor.",
        f"# {_heading(proposals)}",
        others,
        f"base_model: {_quote(base)}",
        f"dataset: {_quote(dataset)}",
        "",
        f"# What was found in the table: {found}{guess}",
    ]
    if layout.kind not in ("chat", "text") and layout.target:
        kind = "category" if layout.classes else "text"
        out.append("input_features:")
        out += [f"  - {{name: {_quote(name)}, type: text}}" for name in layout.inputs]
        out += ["output_features:", f"  - {{name: {_quote(layout.target)}, type: {kind}}}"]
        out += _prompt(layout)
    if encoding:
        out += ["preprocessing:", f"  encoding: {_quote(encoding)}"]
    out += [
        "",
        "adapter:",
        "  type: lora          # null trains all weights",
        *(
            ["quantization:", f"  bits: {bits}             # this base does not fit into memory here otherwise"]
            if bits
            else ["# quantization:", "#   bits: 4           # when the base does not fit otherwise"]
        ),
        "",
        "trainer:",
        "  type: finetune",
        "  epochs: 3",
        "  batch_size: 16      # rows of one optimizer step (times gradient_accumulation_steps)",
        "  learning_rate: 2e-4",
        "",
        "generation:",
        f"  max_new_tokens: {room}    # room for the longest answer of the table and more",
        "",
    ]
    return "\n".join(out)
