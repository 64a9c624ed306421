"""The progress of libraries that draw bars, of files that grow, and of a child process, as events."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from luthier import events
from luthier.assets.bars import BarStream, download_bar
from luthier.run.watch import growing


def told(seen: list[events.Event]) -> list[tuple[float, float | None, str]]:
    return [(e.completed, e.total, e.unit) for e in seen if isinstance(e, events.Progress)]


def test_a_drawn_bar_is_read() -> None:
    from tqdm import tqdm

    seen: list[events.Event] = []
    for _ in tqdm(range(8), file=BarStream(seen.append, "convert", "tensors"), mininterval=0):
        time.sleep(0.03)
    counts = told(seen)
    assert len(counts) >= 2 and counts == sorted(counts)
    assert all(total == 8 and unit == "tensors" for _, total, unit in counts)


def test_a_download_is_told_in_megabytes_and_once() -> None:
    seen: list[events.Event] = []
    bar = download_bar(seen.append, "fetch")
    transfer = bar(total=3_000_000, unit="B", name="x.transfer")
    written = bar(total=3_000_000, unit="B", name="x")
    files = bar(total=4)
    for one in (transfer, written, files):
        one.update(2)
    written.update(1_499_998)
    for one in (transfer, written, files):
        one.refresh()
        one.close()
    assert (1.5, 3.0, "MB") in told(seen) and {unit for _, _, unit in told(seen)} == {"MB"}
    assert max(done for done, _, _ in told(seen)) == 1.5


def test_a_growing_folder_tells_how_far_it_is(tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(b"x" * 1000)
    seen: list[events.Event] = []
    with growing(seen.append, "save", tmp_path, 4_000_000, every=0.01):
        (tmp_path / "weights").write_bytes(b"x" * 1_000_000)
        time.sleep(0.1)
    counts = told(seen)
    assert counts[0] == (0.0, 4.0, "MB") and counts[-1] == (1.0, 4.0, "MB")
    with pytest.raises(ZeroDivisionError), growing(seen.append, "save", tmp_path, 1, every=0.01):
        _ = 1 / 0
    after = len(seen)
    time.sleep(0.05)
    assert len(seen) == after  # the watcher has ended


def test_converting_tells_of_each_file(tmp_path: Path) -> None:
    import torch

    from luthier.assets import convert_pickled

    (tmp_path / "old").mkdir()
    for number in (1, 2):
        torch.save({f"w{number}": torch.zeros(2)}, tmp_path / "old" / f"pytorch_model-0000{number}-of-00002.bin")
    seen: list[events.Event] = []
    convert_pickled(tmp_path / "old", seen.append)
    assert told(seen)[0] == (1, 2, "files")
    assert [e.done for e in seen if isinstance(e, events.Stage)] == [False, True]
