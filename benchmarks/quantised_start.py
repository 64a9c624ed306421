"""Loading a base into 4 bits: without its cache, while that is written, and from it, each in a process of its own.

    python benchmarks/quantised_start.py FOLDER [--shape 7b] [--layers 8] [--device cpu] [--weights quantised resident]

FOLDER is made with random weights when it is not there. Seconds are those of `load_decoder`, files in the page cache
(``--unread``: dropped from it before each), torch imported, the device awake; ``cpu`` are those of all its threads.
``first`` writes, ``second`` hashes what it reads, ``third`` knows the hash. ``host`` is the process's most memory that
no file stands behind, in GiB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

STARTS = ("without", "first", "second", "third")


def anonymous() -> float:
    """GiB of the process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def one(folder: Path, cache: Path, start: str, device: str, weights: str) -> None:
    """One loading in this process; prints its result."""
    import torch

    from luthier.model.decoder.kept import Keeping
    from luthier.model.decoder.load import Placing, load_decoder
    from luthier.model.decoder.shape import read_shape

    torch.zeros(1, device=device)
    most, ended = [anonymous()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    how = Placing(torch.bfloat16, device, quantised="nf4", weights=weights)  # type: ignore[arg-type]
    keeping = None if start == "without" else Keeping(cache, "benchmark")
    begun, busy = time.perf_counter(), time.process_time()
    load_decoder(folder, read_shape(folder), how, keeping=keeping)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    ended.set()
    watching.join()
    kept = sum(path.stat().st_size for path in cache.glob("quantised/*/*"))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else 0.0
    found = {"seconds": seconds, "cpu": busy, "host": most[0], "device": peak, "kept_gib": kept / 2**30}
    said = {"weights": weights, "start": start} | {name: round(value, 2) for name, value in found.items()}
    print(json.dumps(said), flush=True)


def main() -> None:
    """All starts of all placements."""
    from seed_job import forget
    from workload import make_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--weights", nargs="*", default=["quantised"])
    parser.add_argument("--unread", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.folder, Path(given.one[0]), given.one[1], given.device, given.one[2])
        return
    make_model(given.folder, given.shape, given.device, given.layers)
    for weights in given.weights:
        with tempfile.TemporaryDirectory() as cache:
            for start in STARTS:
                for folder in (given.folder, *Path(cache).glob("quantised/*")) if given.unread else ():
                    forget(folder)
                command = [sys.executable, __file__, str(given.folder), "--device", given.device]
                subprocess.run([*command, "--one", cache, start, weights], check=True)


if __name__ == "__main__":
    main()
