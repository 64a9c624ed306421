"""What a process that is killed leaves half written is never seen, and goes away with the next write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.assets.cache import build_once
from luthier.errors import RunError
from luthier.run import atomic
from luthier.run.staging import staged, staging_of


def killed(work: Callable[[], None]) -> None:
    """Do it in a process of its own, which has to end by SIGKILL."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def test_a_file_begun_by_a_dead_process_is_removed_and_one_of_a_living_stands(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "a.json", "old")

    def work() -> None:
        atomic._take_place = die
        atomic.write_text(tmp_path / "a.json", "new")

    killed(work)
    left = [name for name in names(tmp_path) if name != "a.json"]
    assert len(left) == 1 and left[0].endswith(atomic.BEGUN)
    assert (tmp_path / "a.json").read_text() == "old"
    handle, living = atomic._begin(tmp_path / "b.json")
    try:
        atomic.write_text(tmp_path / "c.json", "another file of the folder")
        assert names(tmp_path) == sorted(["a.json", "c.json", Path(living).name])
    finally:
        os.close(handle)
    atomic.sweep(tmp_path)
    assert names(tmp_path) == ["a.json", "c.json"]


def test_a_sweep_that_is_faster_costs_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold, swept = atomic.oslock.hold, []

    def late(handle: int, **options: bool) -> bool:
        if not swept:
            swept.append(1)
            next(tmp_path.iterdir()).unlink()
        return hold(handle, **options)

    monkeypatch.setattr(atomic.oslock, "hold", late)
    atomic.write_text(tmp_path / "a.json", "text")
    assert swept and names(tmp_path) == ["a.json"]


def test_a_staged_folder_is_the_old_one_until_it_is_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "made"

    def make(text: str, end: Callable[[], object] = lambda: None) -> None:
        with staged(target) as folder:
            (folder / "a").write_text(text)
            (folder / text).write_text("")
            end()

    make("old")
    killed(lambda: make("half", die))
    assert names(target) == ["a", "old"] and len(names(tmp_path)) == 2
    with pytest.raises(KeyboardInterrupt):
        make("half", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert names(target) == ["a", "old"] and names(tmp_path) == ["made"]
    killed(lambda: make("half", die))
    make("new")
    assert names(target) == ["a", "new"] and names(tmp_path) == ["made"]


def test_two_processes_do_not_make_the_same_folder(tmp_path: Path) -> None:
    with staged(tmp_path / "made") as folder:
        (folder / "a").write_text("first")
        with pytest.raises(RunError) as caught, staged(tmp_path / "made"):
            pass
        assert caught.value.code == "run-in-use" and staging_of(tmp_path / "made").is_dir()
    assert (tmp_path / "made" / "a").read_text() == "first" and names(tmp_path) == ["made"]


def test_what_a_killed_maker_left_is_not_in_what_is_made(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "half").write_text("")
        die()

    def whole(folder: Path) -> None:
        (folder / "a").write_text("")

    killed(lambda: build_once(tmp_path / "made", half))
    assert "made" not in names(tmp_path)
    build_once(tmp_path / "made", whole)
    assert names(tmp_path) == ["made"] and names(tmp_path / "made") == ["a"]


def called_with(word: str) -> list[int]:
    """The processes that have ``word`` among their arguments."""
    found = []
    for one in Path("/proc").iterdir():
        try:
            if one.name.isdigit() and word in (one / "cmdline").read_bytes().decode(errors="replace").split("\0"):
                found.append(int(one.name))
        except OSError:
            continue  # it has ended
    return found


def until(come: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not come():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no list of processes there")
def test_the_child_of_a_killed_conversion_ends_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pytorch_model.bin")  # which nobody writes into, so that reading it does not end
    target = str(tmp_path.with_name(f"{tmp_path.name}-safetensors.partial"))
    code = "import sys; from luthier.assets import convert_pickled; convert_pickled(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as parent:
        try:
            assert until(lambda: called_with(target)), "no child was started"
            (child,) = called_with(target)
        finally:
            parent.kill()
    ended = until(lambda: not called_with(target))
    if not ended:
        os.kill(child, signal.SIGKILL)
    assert ended
