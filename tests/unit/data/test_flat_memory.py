"""Memory does not grow with the rows beyond a few numbers a row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from rendering_fixtures import byte_level, prompt_section
from luthier.data import columns, sources
from luthier.data.prepare import prepare
from luthier.data.render import Renderer
from luthier.data.source import TableSource
from luthier.data.split import assign

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024

most = [0]
def watch():
    while True:
        most[0] = max(most[0], anonymous())
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
cache = Path(sys.argv[2])
table = sources.read(Path(sys.argv[1]))
layout = columns.detect(table)
split = SimpleNamespace(type="auto", probabilities=(0.9, 0.05, 0.05), column=None, group=None, seed=None)
sides = assign(table, split, seed=1, columns=layout.inputs, cache=cache).rows
made = prepare(table, sides, Renderer(layout, prompt_section(), byte_level()), cache=cache)
source = TableSource(made.examples["train"], 16, 1, made.stats.data_hash)
for _ in range(200):
    source.next_step()
print(most[0], len(made.examples["train"]))
"""


def peak(tmp_path: Path, rows: int) -> int:
    data = tmp_path / f"{rows}.csv"
    with data.open("w") as stream:
        stream.write("prompt,completion\n")
        stream.writelines(f"what is {n} and why is it what it is today {n * 7919},it is {n}\n" for n in range(rows))
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "LUTHIER_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", CODE, str(data), str(tmp_path / "cache")]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    most, examples = map(int, run.stdout.split())
    assert examples > 0.85 * rows
    return most


@pytest.mark.long
@pytest.mark.timeout(1800)  # a million rows, on one core
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_million_rows_in_flat_memory(tmp_path: Path) -> None:
    """Up to 160 bytes a row: its side, its place in the order, its length, hashes of its text."""
    small, large = peak(tmp_path, 20_000), peak(tmp_path, 1_000_000)
    assert large - small < 160 * 980_000, f"{small / 2**20:.0f} and {large / 2**20:.0f} MiB"
