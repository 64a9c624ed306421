"""Faults put into real `luthier train` and `luthier predict` processes, and a table of what held.

    python tests/faults/drive.py            a few of each
    python tests/faults/drive.py --long     200 kills, 20 resumes, 100 corruptions, … over both ways to run a model
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

import cases
import children
import claims
import fuzz
import learning
import predictions
import surroundings

CASES = {**cases.CASES, "predictions": predictions.kills, **surroundings.CASES, **learning.CASES}
SHORT = {**cases.SHORT, **surroundings.SHORT, **learning.SHORT}
LONG = {**cases.LONG, **surroundings.LONG, **learning.LONG}


ALONE: dict[str, Callable[[bool], list[cases.Row]]] = {"claims": claims.rows, "fuzz": fuzz.rows}  # whatever the engine


def main() -> int:
    """Run the cases; 1 when something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[*CASES, *ALONE, []], help="these cases; none: all")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--engine", action="append", choices=("decoder", "generic"), help="default: both")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, help="write the figures here as well; page.py makes the page of them")
    asked = parser.parse_args()
    began, rows = time.monotonic(), []
    wanted = asked.only or [*CASES, *([] if asked.engine else ALONE)]
    for name in (one for one in wanted if one in ALONE):
        rows += [("", row) for row in _told("", ALONE[name](asked.long))]
    children.warm()
    rows += _by_engine([name for name in wanted if name in CASES], asked)
    print("\n".join(table(rows)))
    print(f"\nseed {asked.seed}, {time.monotonic() - began:.0f} s")
    if asked.json is not None:
        found = [{"engine": engine, **vars(row)} for engine, row in rows]
        kind = {"seed": asked.seed, "long": asked.long, "seconds": round(time.monotonic() - began), "commit": commit()}
        asked.json.write_text(json.dumps({**kind, "rows": found}, indent=1), encoding="utf-8")
    return int(any(row.held != row.asked for _, row in rows))


def _by_engine(names: list[str], asked: argparse.Namespace) -> list[tuple[str, cases.Row]]:
    """The cases of real processes, with each way to run a model."""
    counts, rows = LONG if asked.long else SHORT, []
    with tempfile.TemporaryDirectory(prefix="luthier-faults-") as folder:
        root = Path(folder)
        cases.make_base(root)
        for engine in (asked.engine or ("decoder", "generic")) if names else ():
            bench = cases.Bench(root, engine, asked.seed)
            for name in names:
                rows += [(engine, row) for row in _told(engine, CASES[name](bench, counts[name]))]
    return rows


def _told(engine: str, rows: list[cases.Row]) -> list[cases.Row]:
    for row in rows:
        print(f"{engine}: {row.what}: {row.held} of {row.asked} {'; '.join(row.notes)}", file=sys.stderr)
        for line in row.wrong:
            print(f"    {line}", file=sys.stderr)
    return rows


def commit() -> str:
    """The commit of the tree that was run, marked when files differ from it."""
    root = Path(__file__).parents[2]
    made = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    return subprocess.run(made, capture_output=True, text=True).stdout.strip()


def table(rows: list[tuple[str, cases.Row]]) -> list[str]:
    """The figures as a Markdown table."""
    lines = ["| # | what | run by | held | notes |", "|---|---|---|---|---|"]
    return lines + [
        f"| {row.number} | {row.what} | {engine} | {row.held} of {row.asked} | {'; '.join(row.notes)} |"
        for engine, row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
