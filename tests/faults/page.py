"""Puts the figures of `drive.py --json` into the page: `python tests/faults/page.py A.json B.json …`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
COMMANDS = {True: "make test-faults", False: "python tests/faults/drive.py"}


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


def table(parts: list[dict[str, object]]) -> list[str]:
    """One row a requirement and engine, by the requirement's number."""
    rows = [(row, part) for part in parts for row in part["rows"]]  # type: ignore[attr-defined]
    rows.sort(key=lambda pair: (_number(pair[0]["number"]), pair[0]["what"], pair[0]["engine"]))
    seconds = sum(int(part["seconds"]) for part in parts)  # type: ignore[call-overload]
    out = [f"Of commit `{parts[0]['commit']}`, all of it in {seconds / 60:.0f} minutes.", ""]
    out += ["| # | what | run by | held | notes | command |", "|---|---|---|---|---|---|"]
    for row, part in rows:
        held = f"{row['held']:,} of {row['asked']:,}" if row["asked"] else "not run"
        cells = (row["number"], row["what"], row["engine"] or "-", held, "; ".join(row["notes"]), f"`{_command(part)}`")
        out.append(f"| {' | '.join(cells)} |")
    return [*out, ""]


def _command(part: dict[str, object]) -> str:
    return COMMANDS[bool(part["long"])] if part["long"] else f"{COMMANDS[False]} --seed {part['seed']}"


def _number(text: str) -> int:
    first = text.split(",")[0]
    return int(first) if first.isdigit() else 999


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
