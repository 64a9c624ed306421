"""What a tracker has of the runs reported to it, by its own means; prints {run: {metric: [[step, value]]}}.

python read_tracked.py tensorboard|mlflow|wandb|trackio FOLDER
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

Found = dict[str, dict[str, list[list[float]]]]


def tensorboard(folder: Path) -> Found:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for logs in sorted(folder.glob("runs/*/tensorboard")):
        read = EventAccumulator(str(logs))
        read.Reload()
        found[logs.parent.name] = {
            tag: [[event.step, event.value] for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]
        }
    return found


def mlflow(folder: Path) -> Found:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs(["0"])
    assert {run.info.status for run in runs} == {"FINISHED"}
    return {
        run.info.run_name: {
            name: [[one.step, one.value] for one in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        for run in runs
    }


def wandb(folder: Path) -> Found:
    from wandb.proto.wandb_internal_pb2 import Record

    found: Found = {}
    for path in folder.glob("runs/*/wandb/offline-run-*/*.wandb"):
        metrics: dict[str, list[list[float]]] = defaultdict(list)
        name = ""
        for data in _log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            name = record.run.display_name or name
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                if not key.startswith("_"):
                    metrics[key].append([row["_step"], value])
        found[name] = dict(metrics)
    return found


def _log_records(data: bytes, block: int = 32 * 1024) -> Iterator[bytes]:
    """The records of an offline run: a LevelDB log after a header of 7 bytes (4 of check, 2 of length, 1 of kind)."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def trackio(folder: Path) -> Found:
    found: Found = defaultdict(lambda: defaultdict(list))
    with sqlite3.connect(folder / "trackio" / "luthier.db") as base:
        for run, step, metrics in base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id"):
            for name, value in json.loads(metrics).items():
                found[run][name].append([step, value])
    return found


if __name__ == "__main__":
    reader = {"tensorboard": tensorboard, "mlflow": mlflow, "wandb": wandb, "trackio": trackio}[sys.argv[1]]
    print(json.dumps(reader(Path(sys.argv[2]))))
