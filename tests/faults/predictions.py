"""What is done to `luthier predict` over thousands of rows, and what has to hold afterwards."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import cases
import children
import pandas as pd
from pyarrow import parquet

ROWS = 3000
BAD = 1234  # a row whose prompt has no room in the model's context
FORMATS = (".jsonl", ".csv", ".parquet")


def kills(bench: cases.Bench, count: int) -> list[cases.Row]:
    """SIGKILL at random times, gone on with until the file is there: nothing lost, nothing twice, order kept."""
    row = cases.Row("-", f"SIGKILL of predict over {ROWS:,} rows: what was finished stays, no row twice, files whole")
    ended = cases.Row("-", "predictions that were killed again and again: the file equals a straight one's")
    seconds, straight = _straight(bench)
    killed_at: list[int] = []
    while row.asked < count:
        suffix = FORMATS[ended.asked % len(FORMATS)]
        target = bench.root / f"killed{suffix}"
        target.unlink(missing_ok=True)
        before: list[bytes] = []
        while True:
            child = _predict(bench, target)
            time.sleep(bench.draw.uniform(0, seconds))
            code = child.kill()
            if code != -9:
                break
            after = _journal(target)
            wrong = _wrong(before, after, target, straight)
            row.count(not wrong, f"{target.name}: {'; '.join(wrong)}")
            before = after or before
            killed_at.append(max(len(after) - 1, 0))
        said = child.output()
        wrong = [] if code == 0 else [f"exit {code}: {said[-300:]}"]
        wrong += [] if code or _read(target) == straight else ["the file is not the straight one's"]
        counted = f"{len(before) - 1} of {ROWS} rows" in said
        wrong += [] if len(before) < 2 or counted else [f"not going on from {len(before) - 1} rows: {said[-300:]}"]
        litter = [path.name for path in bench.root.iterdir() if target.name in path.name and path != target]
        ended.count(not wrong and not litter, f"{target.name}: {'; '.join([*wrong, *litter])}")
    row.notes.append(f"finished rows at a kill: {min(killed_at)} to {max(killed_at)}")
    row.notes.append("one row without room in the context: reported in each")
    return [row, ended]


def _straight(bench: cases.Bench) -> tuple[float, list[dict[str, Any]]]:
    """How long a prediction takes that nothing happens to, and what it says."""
    lines = [f"what is {i} and {i * 7}?" if i != BAD else "why? " * 200 for i in range(ROWS)]
    (bench.root / "asked.csv").write_text("question\n" + "\n".join(lines) + "\n", encoding="utf-8")
    target = bench.root / "straight.jsonl"
    began = time.monotonic()
    child = _predict(bench, target)
    assert child.wait() == 0, child.output()[-2000:]
    found = _read(target)
    assert [one["row"] for one in found] == list(range(ROWS))
    assert [one["row"] for one in found if one["error"]] == [BAD], "one bad row, reported and not fatal"
    return time.monotonic() - began, found


def _predict(bench: cases.Bench, target: Path) -> children.Child:
    asked = ("straight", "--dataset", "asked.csv", "--output", target.name)
    return children.start(bench.root, *asked, command="predict")


def _journal(target: Path) -> list[bytes]:
    """The whole lines of the journal, its head among them."""
    path = target.with_name(f"{target.name}.partial")
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def _wrong(before: list[bytes], after: list[bytes], target: Path, straight: list[dict[str, Any]]) -> list[str]:
    """What does not hold after a kill."""
    if target.exists():  # it was ended between renaming the file and removing the journal
        return [] if _read(target) == straight else ["the file is there and not whole"]
    rows = [json.loads(line)["row"] for line in after[1:]]
    wrong = [] if after[: len(before)] == before else ["rows that were finished are not as they were"]
    return wrong + ([] if len(rows) == len(set(rows)) else ["a row stands twice in the journal"])


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of any format, alike."""
    if path.suffix == ".jsonl":
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    elif path.suffix == ".csv":
        found = pd.read_csv(path, keep_default_na=False).to_dict("records")
    else:
        found = parquet.read_table(path).to_pylist()
    names = ("row", "response", "finish_reason", "error")
    return [{name: one.get(name) or ("" if name != "row" else 0) for name in names} for one in found]
