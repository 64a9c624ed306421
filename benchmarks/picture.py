"""A bar chart of a table of speeds, as SVG.

python benchmarks/picture.py benchmarks/results/peers_h200.csv docs/assets/peers.svg
"""

from __future__ import annotations

import argparse
import csv
from html import escape
from pathlib import Path

WIDTH, BAR, GAP, LABEL, NUMBER = 760, 20, 8, 210, 70
COLOURS = {"luthier": "#1f6f5c", "other": "#a9b4b0"}
FONT = "font-family='system-ui, sans-serif' font-size='13'"


def draw(rows: list[dict[str, str]], title: str) -> str:
    """One bar a row, the fastest first; its length is tokens a second."""
    done = sorted((row for row in rows if row["tokens_per_s"]), key=lambda row: -float(row["tokens_per_s"]))
    most = float(done[0]["tokens_per_s"])
    lines = []
    for place, row in enumerate(done):
        value, top = float(row["tokens_per_s"]), 40 + place * (BAR + GAP)
        length = max(1.0, (WIDTH - LABEL - NUMBER) * value / most)
        colour = COLOURS.get(row["who"], COLOURS["other"])
        name = escape(f"{row['who']}: {row['setting']}")
        middle = top + BAR * 0.72
        lines += [
            f"<text x='{LABEL - 8}' y='{middle:.0f}' text-anchor='end' {FONT} fill='#333'>{name}</text>",
            f"<rect x='{LABEL}' y='{top}' width='{length:.1f}' height='{BAR}' rx='2' fill='{colour}'/>",
            f"<text x='{LABEL + length + 6:.0f}' y='{middle:.0f}' {FONT} fill='#333'>{value:,.0f}</text>",
        ]
    height = 48 + len(done) * (BAR + GAP)
    head = f"<text x='12' y='24' {FONT} font-weight='600' fill='#111'>{escape(title)}</text>"
    size = f"width='{WIDTH}' height='{height}' viewBox='0 0 {WIDTH} {height}'"
    back = f"<rect width='{WIDTH}' height='{height}' fill='white'/>"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img'>{back}{head}{''.join(lines)}</svg>\n"


def main() -> None:
    """Read the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", default="Training a Llama-7B with QLoRA on one H200, real tokens a second")
    given = parser.parse_args()
    with given.table.open(newline="") as stream:
        given.picture.write_text(draw(list(csv.DictReader(stream)), given.title), encoding="utf-8")


if __name__ == "__main__":
    main()
