"""How fast rows become tokens, and in how much memory: read, split, render, tokenise, audit; then the same once more.

python benchmarks/data_speed.py                         20,000 and 1,000,000 rows
python benchmarks/data_speed.py --rows 20000 --json

Rows have CodeAlpaca's shape (instruction, input in under half of them, a few lines of code). Each measurement is a
process of its own with an empty cache of its own; the second time is another process with the first one's cache. The
base model's files are made before. Memory is anonymous memory (what cannot be given back); the resident set also
counts pages of mapped files, which the system takes back when it needs them. ``cpu`` is the seconds of all processes
together: on a busy machine the wall clock says more about the others.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TEXT = """write a function that returns the sum of two numbers list sort array string python class method value given
input create code query select from table where user data reverse find check loop print result algorithm"""
WORDS = TEXT.split()


def make(path: Path, rows: int) -> None:
    """A CSV of ``rows`` rows, the same each time."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["instruction", "input", "output"])
        for n in range(rows):
            given = words(draw.randint(3, 12)) if draw.random() < 0.45 else ""
            lines = [
                f"    {draw.choice(WORDS)} = {draw.choice(WORDS)}({draw.choice(WORDS)}, {draw.randint(0, 99)})"
                for _ in range(draw.randint(1, 8))
            ]
            writer.writerow([f"{words(draw.randint(6, 20))} {n}.", given, "\n".join([f"def f{n}(x):", *lines])])


def status(field: str) -> float:
    """MiB of one line of this process's memory, 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), 0.0)


def measure(data: Path, base: str) -> dict[str, float]:
    """Seconds of each part and MiB of memory; runs in a process of its own."""
    begun = last = time.perf_counter()
    out: dict[str, float] = {}
    most = [0.0]

    def watch() -> None:
        while True:
            most[0] = max(most[0], status("RssAnon"))
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()

    def lap(name: str) -> None:
        nonlocal last
        out[name], last = round(time.perf_counter() - last, 3), time.perf_counter()

    from luthier import assets, config
    from luthier.assets import template_worker
    from luthier.assets.cache import cache_root
    from luthier.assets.tokenizer import Tokenizer
    from luthier.data import columns, sources
    from luthier.data.prepare import prepare
    from luthier.pipeline import preparing

    settings = config.load({"base_model": base})
    resolved = assets.resolve(base)
    tokenizer = Tokenizer.load(resolved.path)
    lap("start")
    table = sources.read(data)
    lap("read")
    layout = columns.detect(table)
    sides = preparing.divide(settings, table, layout).rows
    lap("split")
    renderer = preparing.renderer_of(settings, layout, tokenizer, resolved, table.columns, table.name)
    prepared = prepare(table, sides, renderer, cache=cache_root())
    lap("tokenise")
    out["total"] = round(time.perf_counter() - begun, 3)
    template_worker.shared().close()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    out["cpu"] = round(sum(u.ru_utime + u.ru_stime for u in used), 3)
    out["tokens"] = prepared.stats.tokens
    out["anonymous_mib"] = round(max(most[0], status("RssAnon")))
    out["resident_mib"] = round(status("VmHWM"))
    return out


def main() -> None:
    """Make the files, measure each twice, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 1_000_000])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.base)))
        return
    from luthier import assets

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        os.environ["LUTHIER_CACHE"] = str(cache)
        assets.resolve(given.base)  # converting the embedded base is not what is measured
        for rows in given.rows:
            data = Path(folder) / f"{rows}.csv"
            make(data, rows)
            for attempt in ("first", "second"):
                load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
                command = [sys.executable, __file__, "--base", given.base, "--measure", str(data)]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                found = {"rows": rows, "time": attempt, "load": round(load, 1), **json.loads(run.stdout)}
                print(json.dumps(found) if given.json else "  ".join(f"{k} {v}" for k, v in found.items()), flush=True)
            for made in ("prepared", "splits", "tables"):
                shutil.rmtree(cache / made, ignore_errors=True)


if __name__ == "__main__":
    main()
