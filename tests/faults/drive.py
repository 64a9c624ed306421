"""Faults put into real `luthier` processes, and a table of what held.

    python tests/faults/drive.py            a few of each
    python tests/faults/drive.py --long     200 kills, 20 resumes, 100 corruptions, … over both ways to run a model

Each kind is a job in a process of its own: one that fails, hangs or dies is a line that did not hold, and the others go
on. Figures are written to `--json` after every job.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

import cases
import children
import claims
import fuzz
import later
import learning
import parsers
import predictions
import surroundings

KINDS = (cases, surroundings, learning, later)
CASES = {"predictions": predictions.kills} | {name: case for kind in KINDS for name, case in kind.CASES.items()}
SHORT = {name: count for kind in KINDS for name, count in kind.SHORT.items()}
LONG = {name: count for kind in KINDS for name, count in kind.LONG.items()}
ALONE = ("claims", "fuzz")  # whatever the engine
ENGINES = ("decoder", "generic")
LIMIT = 45 * 60  # seconds for one job
SLOWEST = ("claims", "kills", "predictions", "mirror", "corruptions", "finishing", "evaluating", "signals", "fuzz")


@dataclass
class Job:
    """A kind of fault with one way to run a model, or something that needs none."""

    name: str
    engine: str
    run: Callable[[], list[cases.Row]]
    rows: list[cases.Row] = field(default_factory=list)
    pid: int = 0
    began: float = 0.0


def main() -> int:
    """Run the cases; 1 when something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[*CASES, *ALONE, []], help="these cases; none: all")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default: both")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time, each on one thread")
    parser.add_argument("--json", type=Path, help="write the figures here as well; page.py makes the page of them")
    asked = parser.parse_args()
    began, of = time.monotonic(), commit()
    children.warm()
    with tempfile.TemporaryDirectory(prefix="luthier-faults-", ignore_cleanup_errors=True) as folder:
        os.environ["LUTHIER_CACHE"] = str(Path(folder) / "cache")
        jobs = _jobs(asked, Path(folder))
        for _ in _done(jobs, asked.jobs, Path(folder)):
            if asked.json is not None:
                _write(asked.json, jobs, asked, of, began)
    rows = [(job.engine, row) for job in jobs for row in job.rows]
    print("\n".join(table(rows)))
    print(f"\nseed {asked.seed}, {time.monotonic() - began:.0f} s")
    return int(any(row.failed for _, row in rows))


def _jobs(asked: argparse.Namespace, root: Path) -> list[Job]:
    """What is to be done, that which takes longest first."""
    names = asked.only or [*CASES, *([] if asked.engine else ALONE)]
    counts, engines = LONG if asked.long else SHORT, asked.engine or ENGINES
    if any(name in CASES for name in names):
        cases.make_base(root)
    jobs = []
    for name in sorted(names, key=lambda name: SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)):
        if name == "claims":
            jobs.append(Job(name, "", lambda: claims.rows(asked.long)))
        elif name == "fuzz":
            jobs += [Job(f"fuzz {one}", "", lambda one=one: [fuzz.row(one, asked.long)]) for one in parsers.TARGETS]
        else:
            jobs += [Job(name, one, lambda name=name, one=one: _case(root, name, one, asked.seed, counts[name]))
                     for one in engines]  # fmt: skip
    return jobs


def _case(root: Path, name: str, engine: str, seed: int, count: int) -> list[cases.Row]:
    return CASES[name](cases.Bench(root, engine, seed, name), count)


def _done(jobs: list[Job], at_once: int, folder: Path) -> Iterator[Job]:
    """Run the jobs, so many at a time; yields each as it ends, with its rows."""
    waiting, running = list(jobs), []
    try:
        yield from _through(waiting, running, at_once, folder)
    finally:
        for job in running:  # we are ended; they are groups of their own
            os.killpg(job.pid, signal.SIGKILL)


def _through(waiting: list[Job], running: list[Job], at_once: int, folder: Path) -> Iterator[Job]:
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(_begin(waiting.pop(0), folder))
        for job in list(running):
            overdue = time.monotonic() - job.began > LIMIT
            if overdue:
                os.killpg(job.pid, signal.SIGKILL)
            if os.waitpid(job.pid, 0 if overdue else os.WNOHANG)[0]:
                running.remove(job)
                job.rows = _rows(job, folder, overdue)
                _tell(job)
                yield job
        time.sleep(0.05)


def _begin(job: Job, folder: Path) -> Job:
    """Fork a process for the job, in a group of its own."""
    sys.stdout.flush()
    job.began = time.monotonic()
    job.pid = os.fork()
    if job.pid:
        return job
    os.setpgid(0, 0)
    cases.BEGUN.clear()
    try:
        rows = job.run()
    except BaseException:
        rows = [row for row in cases.BEGUN if row.asked] + [_not_ended(job, traceback.format_exc())]
    _place(job, folder).write_text(json.dumps([vars(row) for row in rows]), encoding="utf-8")
    os._exit(0)


def _place(job: Job, folder: Path) -> Path:
    return folder / f"{job.name}-{job.engine}.json".replace(" ", "-")


def _rows(job: Job, folder: Path, overdue: bool) -> list[cases.Row]:
    """What a job has left; a line that did not hold where it left nothing."""
    place = _place(job, folder)
    if place.exists():
        return [cases.Row(**one) for one in json.loads(place.read_text(encoding="utf-8"))]
    why = f"it took more than {LIMIT / 60:.0f} minutes" if overdue else "its process died"
    return [_not_ended(job, why)]


def _not_ended(job: Job, why: str) -> cases.Row:
    return cases.Row("-", f"{job.name} could not be run to its end", 1, 0, [], [why])


def _tell(job: Job) -> None:
    for row in job.rows:
        print(f"{job.engine}: {row.what}: {row.held} of {row.asked} {'; '.join(row.notes)}", file=sys.stderr)
        for line in row.wrong:
            print(f"    {line}", file=sys.stderr)
    print(f"{job.engine}: {job.name} took {time.monotonic() - job.began:.0f} s", file=sys.stderr, flush=True)


def _write(path: Path, jobs: list[Job], asked: argparse.Namespace, of: str, began: float) -> None:
    found = [{"engine": job.engine, **vars(row)} for job in jobs for row in job.rows]
    kind = {"seed": asked.seed, "long": asked.long, "seconds": round(time.monotonic() - began), "commit": of}
    path.write_text(json.dumps({**kind, "rows": found}, indent=1), encoding="utf-8")


def commit() -> str:
    """The commit of the tree that is run, marked when files differ from it."""
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
