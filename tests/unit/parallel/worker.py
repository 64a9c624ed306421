"""A training as each rank of a test runs it: `worker.py SETTINGS.json RUN [stop STEP | full ROWS]`.

The rows that it took are noted in a file beside the run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from luthier import config, events, pipeline
from luthier.errors import Interrupted
from luthier.parallel import place
from luthier.train import step


def main(settings: Path, run: Path, stop: int | None = None, full: int | None = None) -> None:
    """Train. SIGTERM comes to the last rank alone, in step ``stop``; its memory holds less than ``full`` rows."""
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

    step.collate = noted
    try:
        done = pipeline.train(config.load(given["config"]), given["rows"], output=run, sink=events.silent)
        assert done.history["train"]["loss"]  # every rank has the result in its hands
    except Interrupted:
        assert stop is not None
    (run.parent / f"{run.name}-{here.world}-{here.rank}.json").write_text(json.dumps(taken), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), **dict(zip(sys.argv[3::2], map(int, sys.argv[4::2]), strict=True)))
