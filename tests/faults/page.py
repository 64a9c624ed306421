"""Puts the figures of `drive.py --json` into the page: `python tests/faults/page.py A.json B.json …`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
COMMANDS = {True: "make test-faults", False: "python tests/faults/drive.py"}
TOLD = 300  # characters of what was found instead
Line = Mapping[str, Any]


def main(files: list[str]) -> int:
    """Write the table; refuses figures of several commits."""
    parts = [json.loads(Path(one).read_text(encoding="utf-8")) for one in files]
    commits = {part["commit"] for part in parts}
    if len(commits) != 1:
        print(f"the figures are of several commits: {', '.join(sorted(commits))}", file=sys.stderr)
        return 1
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n".join(table(parts)) + "\n" + END + after, encoding="utf-8")
    return 0


def table(parts: list[dict[str, Any]]) -> list[str]:
    """One row a requirement, over both ways to run a model, by the requirement's number; then what did not hold."""
    found: dict[tuple[int, str, str], list[Line]] = {}
    for row in (row for part in parts for row in part["rows"]):
        found.setdefault((_number(row["number"]), row["number"], row["what"]), []).append(row)
    seconds = sum(int(part["seconds"]) for part in parts)
    out = [f"Of commit `{parts[0]['commit']}`, in {seconds / 60:.0f} minutes, by `{_command(parts)}`.", ""]
    out += ["| # | what | held | notes |", "|---|---|---|---|"]
    out += [f"| {key[1]} | {key[2]} | {_held(found[key])} | {_notes(found[key])} |" for key in sorted(found)]
    wrong = [f"- {row['what']}: {_short(line)}" for key in sorted(found) for row in found[key] for line in row["wrong"]]
    return [*out, "", *(["Did not hold:", "", *wrong, ""] if wrong else [])]


def _held(rows: list[Line]) -> str:
    """So many of so many; in bold where some are missing, and by engine where there are two."""
    held, asked = (sum(int(row[name]) for row in rows) for name in ("held", "asked"))
    if not asked:
        return "not run"
    total = f"{held:,} of {asked:,}"
    each = ", ".join(f"{row['engine']} {row['held']:,}" for row in rows) if len(rows) > 1 else rows[0]["engine"]
    return (total if held == asked else f"**{total}**") + (f" ({each})" if each else "")


def _notes(rows: list[Line]) -> str:
    """What the rows say beside their figures; which engine says it where they differ."""
    said = {row["engine"]: "; ".join(row["notes"]) for row in rows}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{engine}: {text}" for engine, text in said.items())


def _short(line: str) -> str:
    text = " ".join(line.replace("|", "/").replace("`", "'").replace("<", "‹").split())
    return text if len(text) <= TOLD else "… " + text[-TOLD:]


def _command(parts: list[dict[str, Any]]) -> str:
    return COMMANDS[True] if all(part["long"] for part in parts) else f"{COMMANDS[False]} --seed {parts[0]['seed']}"


def _number(text: str) -> int:
    first = text.split(",")[0]
    return int(first) if first.isdigit() else 999


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
