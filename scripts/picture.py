"""Make the README's picture from what a real demo printed: `make picture`, or `python scripts/picture.py demo.log`."""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "assets" / "demo.svg"


def main() -> None:
    """Write docs/assets/demo.svg from the log's lines, colours kept, redrawn progress lines collapsed to their last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("--skip", nargs="*", default=[], help="leave out lines that contain one of these")
    parser.add_argument("--tables", type=int, default=2, help="what follows so many tables is left out")
    arguments = parser.parse_args()
    raw = arguments.log.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    lines = [line.rsplit("\r", 1)[-1] for line in raw.split("\n")]
    start = next((place for place, line in enumerate(lines) if "$ luthier" in line), 0)
    ends = [place for place, line in enumerate(lines) if line.startswith("└")][: arguments.tables]
    shown = lines[start : ends[-1] + 1] if ends else lines[start:]
    kept = [line for line in shown if not any(word in line for word in arguments.skip)]
    console = Console(record=True, width=120, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi("\n".join(kept).strip("\n")))
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    picture = console.export_svg(title="make demo")
    # The fonts of the template come from a server; a picture in a README should ask none.
    OUTPUT.write_text(re.sub(r"@font-face\s*\{[^}]*\}", "", picture), encoding="utf-8")
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
