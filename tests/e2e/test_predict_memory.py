"""`luthier predict` over 100,000 rows in a process of its own: what it holds does not grow with the rows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luthier import config, pipeline

ROWS = 100_000


def rss(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_hundred_thousand_rows_take_flat_memory(tiny_llama: Path, tmp_path: Path) -> None:
    settings = {
        "base_model": str(tiny_llama),
        "prompt": {"template": "{question}\n"},
        "adapter": {"type": "lora", "r": 4},
        "generation": {"max_new_tokens": 2},
        "trainer": {"train_steps": 2, "batch_size": 4, "precision": "fp32", "eval_generation_rows": 0},
    }
    taught = [{"question": f"what is {i}?", "answer": f"it is {i}"} for i in range(16)]
    run = pipeline.train(config.load(settings), taught, output=tmp_path / "run").folder
    table, target = tmp_path / "rows.csv", tmp_path / "answers.jsonl"
    table.write_text("question\n" + "".join(f"what is {i} and {i * 7}?\n" for i in range(ROWS)))
    argv = ["predict", str(run), "--dataset", str(table), "--output", str(target)]
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        code = "import sys; from luthier.cli import main; sys.argv = ['luthier', *sys.argv[1:]]; main()"
        process = subprocess.Popen([sys.executable, "-c", code, *argv], stdout=out, stderr=out)
        measured: list[tuple[int, int]] = []  # rows done, resident bytes
        journal = target.with_name(f"{target.name}.partial")
        while process.poll() is None:
            done = journal.read_bytes().count(b"\n") if journal.exists() else 0
            try:
                measured.append((done, rss(process.pid)))
            except (OSError, IndexError):
                break
            time.sleep(0.5)
    assert process.wait() == 0, log.read_text()[-2000:]
    assert target.read_bytes().count(b"\n") == ROWS
    early = max(size for done, size in measured if done <= ROWS // 5)
    late = max(size for done, size in measured)
    told = f"{early / 1e6:.0f} MB up to a fifth of the rows, {late / 1e6:.0f} MB at most"
    print(told)
    assert late - early < 30e6, told
