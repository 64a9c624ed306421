"""Faults put into real `luthier train` and `luthier predict` processes, and a table of what held.

    python tests/faults/drive.py            a few of each
    python tests/faults/drive.py --long     200 kills, 20 resumes, 100 corruptions, … over both ways to run a model
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

import cases
import children
import predictions
import surroundings

CASES = {**cases.CASES, "predictions": predictions.kills, **surroundings.CASES}
SHORT, LONG = {**cases.SHORT, **surroundings.SHORT}, {**cases.LONG, **surroundings.LONG}


def main() -> int:
    """Run the cases; 1 when something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[*CASES, []], help="these cases; none: all")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--engine", action="append", choices=("decoder", "generic"), help="default: both")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    asked = parser.parse_args()
    counts = LONG if asked.long else SHORT
    began, rows = time.monotonic(), []
    children.warm()
    with tempfile.TemporaryDirectory(prefix="luthier-faults-") as folder:
        root = Path(folder)
        cases.make_base(root)
        for engine in asked.engine or ("decoder", "generic"):
            bench = cases.Bench(root, engine, asked.seed)
            for name in asked.only or CASES:
                for row in CASES[name](bench, counts[name]):
                    rows.append((engine, row))
                    print(f"{engine}: {row.what}: {row.held} of {row.asked} {'; '.join(row.notes)}", file=sys.stderr)
                    for line in row.wrong:
                        print(f"    {line}", file=sys.stderr)
    print("\n".join(table(rows)))
    print(f"\nseed {asked.seed}, {time.monotonic() - began:.0f} s")
    if asked.json is not None:
        found = [{"engine": engine, **vars(row)} for engine, row in rows]
        asked.json.write_text(json.dumps({"seed": asked.seed, "rows": found}, indent=1), encoding="utf-8")
    return int(any(row.held != row.asked for _, row in rows))


def table(rows: list[tuple[str, cases.Row]]) -> list[str]:
    """The figures as a Markdown table."""
    lines = ["| # | what | run by | held | notes |", "|---|---|---|---|---|"]
    return lines + [
        f"| {row.number} | {row.what} | {engine} | {row.held} of {row.asked} | {'; '.join(row.notes)} |"
        for engine, row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
