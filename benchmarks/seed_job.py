"""The whole seed job from the command line: seconds from the start of the process to its first step and its adapter.

    python benchmarks/seed_job.py FOLDER [--config examples/seed/seed_config.yaml] [--out seed_job.json]

FOLDER is a base with a tokenizer (`workload.make_model` makes one without; `--tokenizer` copies one into it). The table
has 500 made rows, 450 of them for training, 5 epochs. `fresh`: one step of a Python whose libraries have no bytecode
yet, no kernels compiled, nothing remembered of the base; `empty`: the same with the bytecode that this made and all
files in the page cache; `unread`: after the base's files were dropped from the page cache. Adapter as in the
figures called seed (r 8 on q, v); an evaluation each epoch by its loss, no generated answers. The lines that the
process wrote, with their seconds, are printed: where the time went.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from provenance import provenance

TEXT = "write a function that returns the sum of two numbers list sort array string class method value given"
WORDS = TEXT.split()
SET = [
    "trainer.eval_generation_rows=0", "generation.max_new_tokens=64", "adapter.r=8",
    "adapter.target_modules=[q_proj,v_proj]",
]  # fmt: skip


def make_table(path: Path) -> None:
    """500 rows about as long as CodeAlpaca's; the last 50 are for validation."""
    draw = random.Random(3)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))

    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["instruction", "input", "output", "split"])
        for row in range(500):
            writer.writerow([words(8, 24), words(0, 8), words(16, 90), int(row >= 450)])


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run(config: Path, folder: Path, table: Path, bytecode: Path, more: list[str]) -> dict[str, Any]:
    """One process with caches of its own, but for Python's ``bytecode``."""
    work = Path(tempfile.mkdtemp())
    output = work / "run"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"LUTHIER_CACHE": str(work / "cache"), "TRITON_CACHE_DIR": str(work / "triton")}
    environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    code = "from luthier.cli import main; main()"
    command = [sys.executable, "-c", code, "train", str(config), "--dataset", str(table), "--output", str(output)]
    for one in (f"base_model={folder}", *SET, *more):
        command += ["--set", one]
    begun = time.time()
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines: list[tuple[float, str]] = []
    assert done.stdout is not None
    reader = threading.Thread(target=_read, args=(done.stdout, begun, lines))
    reader.start()
    saved = None
    while done.poll() is None:
        if saved is None and (output / "adapter" / "adapter_model.safetensors").exists():
            saved = time.time() - begun
        time.sleep(0.02)
    ended = time.time() - begun
    reader.join()
    for seconds, line in lines:
        print(f"{seconds:7.2f} {line}", flush=True)
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first = next(step for step in steps if step["split"] == "train")
    out = {"first_step_s": first["time"] - begun, "adapter_s": saved, "ended_s": ended, "exit": done.returncode}
    shutil.rmtree(work)
    return {key: round(value, 1) if isinstance(value, float) else value for key, value in out.items()}


def _read(stream: Any, begun: float, lines: list[tuple[float, str]]) -> None:
    lines.extend((time.time() - begun, line.rstrip()) for line in stream)


def main() -> None:
    """All three states."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent.parent / "examples/seed/seed_config.yaml")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--set", nargs="*", default=[], dest="more")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    for path in given.tokenizer.iterdir() if given.tokenizer else ():
        shutil.copy(path, given.folder)
    table = Path(tempfile.mkdtemp()) / "seed.csv"
    make_table(table)
    found = provenance("torch", "triton", "transformers", "safetensors", "tokenizers")  # before anything may change
    with tempfile.TemporaryDirectory() as bytecode:
        for state, more in (("fresh", ["trainer.train_steps=1"]), ("empty", []), ("unread", ["trainer.train_steps=2"])):
            if state == "unread":
                forget(given.folder)
            found[state] = run(given.config, given.folder, table, Path(bytecode), [*given.more, *more])
            print("RESULT", state, json.dumps(found[state]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
