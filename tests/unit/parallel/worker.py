"""A training as each rank of a test runs it: `worker.py SETTINGS.json RUN [stop STEP | full ROWS | asleep RANKS]`.

The rows that it took are noted in a file beside the run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from luthier import config, events, pipeline
from luthier.errors import Interrupted
from luthier.parallel import Place, place
from luthier.train import evaluation, step

OVER = threading.Event()  # training has ended


def main(
    settings: Path, run: Path, stop: int | None = None, full: int | None = None, asleep: int | None = None
) -> None:
    """Train. SIGTERM comes to the last rank alone, in step ``stop``; its memory holds less than ``full`` rows.

    ``asleep``: rank 0 evaluates for minutes, and so many ranks, the last first, get a SIGTERM meanwhile.
    """
    torch.set_num_threads(1)
    given = json.loads(settings.read_text(encoding="utf-8"))
    here, taken = place(), []
    collate = step.collate

    def noted(examples, number, **options):
        last = here.rank == here.world - 1
        if full is not None and last and len(examples) >= full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        taken.append([number, [one.row for one in examples]])
        if number == stop and last:
            os.kill(os.getpid(), signal.SIGTERM)
        return collate(examples, number, **options)

    if asleep is not None:
        _evaluate_slowly(here, run, asleep)
    step.collate = noted
    try:
        done = pipeline.train(config.load(given["config"]), given["rows"], output=run, sink=events.silent)
        assert done.history["train"]["loss"]  # every rank has the result in its hands
    except Interrupted as end:
        assert stop is not None or asleep is not None
        assert end.exit_code == 128 + signal.SIGTERM
        (run.parent / f"{run.name}-ended-{here.rank}").write_text(str(time.time()), encoding="utf-8")
    finally:
        OVER.set()
    (run.parent / f"{run.name}-{here.world}-{here.rank}.json").write_text(json.dumps(taken), encoding="utf-8")


def _evaluate_slowly(here: Place, run: Path, told: int) -> None:
    begun, evaluate = run.parent / f"{run.name}-evaluating", evaluation.Evaluator.__call__

    def slowly(self, passes_of):
        begun.touch()
        for _ in range(2000):
            time.sleep(0.05)
        return evaluate(self, passes_of)

    evaluation.Evaluator.__call__ = slowly

    def wait() -> None:
        while not begun.exists():
            time.sleep(0.01)
        time.sleep(0.3)
        (run.parent / f"{run.name}-told-{here.rank}").write_text(str(time.time()), encoding="utf-8")
        if not OVER.is_set():  # on a loaded machine the other rank's may have ended both before
            os.kill(os.getpid(), signal.SIGTERM)

    if here.rank >= here.world - told:
        threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), **dict(zip(sys.argv[3::2], map(int, sys.argv[4::2]), strict=True)))
