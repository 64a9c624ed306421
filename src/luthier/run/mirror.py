"""A second home of a run on storage that is no disk: a mounted drive, a bucket. No locks, no fsync, no rename there.

    slot-0/ slot-1/   written in turn, so that one of them is always whole
        done.json     written last and removed first: the step, and size and sha256 of every other file of the slot
        run.json, config.yaml, …, checkpoints/step-000120/…, adapter/…

Nothing that fails here stops training; it is told as a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from luthier import json_reader
from luthier.errors import RunError
from luthier.events import Event, Note, Saved, Sink, Warned
from luthier.run import atomic
from luthier.run.folder import START, RunFolder
from luthier.secrets import enter_with

FORMAT = 1
SLOTS = 2
DONE = "done.json"
ATTEMPTS = 4  # to write a file
PAUSE = 0.1  # seconds between them
RECORDS = (
    "run.json", "config.yaml", "plan.json", "audit.json", "data.json", "rows.hash", "metrics.jsonl", "outcome.json",
)  # fmt: skip
LINKED = ".mirroring"
LAST_WAIT = 600.0  # seconds that a finished run waits for its last copy
ENDED_WAIT = 15.0  # the same of one that ended early: a preempted machine has half a minute in all


class Mirror:
    """Copies each finished checkpoint in a thread, the newest when several are due. Itself a sink: it hears `Saved`."""

    def __init__(self, url: str, sink: Sink, *, files: Any = None) -> None:
        """``url``: a folder, or what fsspec opens (``hf://…``, ``s3://…``). ``files``: the file system, for tests.

        Raises RunError when there is no such kind of storage.
        """
        enter_with(url)
        self.url, self._sink = url, sink
        self._files, self._root = (files, url) if files is not None else _open(url)
        self._folder: RunFolder | None = None
        self._thread: threading.Thread | None = None
        self._due: Path | None = None
        self._copied: Path | None = None
        self._ended = False
        self._said: list[str] = []
        self._lock = threading.Lock()
        self._slot: int | None = None

    def restore(self, path: Path) -> int | None:
        """Put the newest whole slot where ``path`` has no run yet; its step, or None when there was nothing to do."""
        if (path / "run.json").exists() or (path.exists() and any(path.iterdir())):
            return None
        for done in sorted(self._whole(), key=lambda one: int(one["step"]), reverse=True):
            try:
                self._fetch(done, path)
            except (OSError, ValueError, KeyError) as error:
                shutil.rmtree(path, ignore_errors=True)
                self._sink(Warned(text=f"a copy of step {done.get('step')} in {self.url} is damaged: {error}"))
                continue
            self._sink(Note(text=f"taken from {self.url}: the run up to step {done['step']}"))
            return int(done["step"])
        return None

    def follow(self, folder: RunFolder) -> None:
        """Copy this run, which has its lock, from now on. Raises RunError when the mirror holds another one."""
        held = self._whole()
        others = [one for one in held if one.get("run") != _name(folder)]
        if others:
            raise RunError(
                "run-other-lock",
                "the mirror holds another run; nothing was written to it",
                where=self.url,
                received=others[0].get("run"),
                allowed=_name(folder),
                fix="name another --mirror, or empty this one",
            )
        self._folder = folder
        newest = max(held, key=lambda one: int(one["step"]), default=None)
        self._slot = None if newest is None else int(newest["slot"])

    def __call__(self, event: Event) -> None:
        """Begin to copy a checkpoint that is complete, and tell what the thread had to say."""
        for text in self._take_said():
            self._sink(Warned(text=text))
        if not isinstance(event, Saved) or event.what != "checkpoint" or self._folder is None:
            return
        with self._lock:
            self._due = Path(event.path)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def close(self, timeout: float = LAST_WAIT, *, ended: bool = True) -> None:
        """Copy what the run is now and wait for it, but not forever; without ``ended`` only what is not there yet."""
        if self._folder is None:
            return
        newest = sorted(self._folder.checkpoints.glob("step-*"))
        if newest:
            self._ended = ended
            self(Saved(path=str(newest[-1]), step=0))
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
            if thread.is_alive():
                self._sink(Warned(text=f"the mirror {self.url} has not taken the last copy in {timeout:.0f} s"))
        for text in self._take_said():
            self._sink(Warned(text=text))

    def _take_said(self) -> list[str]:
        with self._lock:
            said, self._said = self._said, []
        return said

    def _work(self) -> None:
        while True:
            with self._lock:
                due, self._due = self._due, None
                if due is None:
                    self._thread = None
                    return
            if due == self._copied and not self._ended:
                continue
            try:
                self._copy(due)
            except Exception as error:  # whatever a storage's library raises
                with self._lock:
                    self._said.append(f"{due.name} was not copied to the mirror {self.url}: {error}; training goes on")

    def _copy(self, checkpoint: Path) -> None:
        assert self._folder is not None
        folder = self._folder.path
        slot = 0 if self._slot is None else (self._slot + 1) % SLOTS
        linked = folder / LINKED
        shutil.rmtree(linked, ignore_errors=True)
        try:
            _gather(folder, checkpoint, linked)
            where = f"{self._root}/slot-{slot}"
            self._remove(f"{where}/{DONE}")
            files = {}
            for path in sorted(one for one in linked.rglob("*") if one.is_file()):
                name, content = path.relative_to(linked).as_posix(), path.read_bytes()
                self._write(f"{where}/{name}", content)
                files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            step = int(checkpoint.name.removeprefix("step-"))
            done = {"format": FORMAT, "run": _name(self._folder), "slot": slot, "step": step, "files": files}
            self._write(f"{where}/{DONE}", json.dumps(done, indent=1).encode())
            self._slot, self._copied = slot, checkpoint
        finally:
            shutil.rmtree(linked, ignore_errors=True)

    def _write(self, path: str, content: bytes) -> None:
        """Write a file; again where the storage fails, or has less than it was given and does not say so."""
        for attempt in range(ATTEMPTS):
            try:
                self._files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                with self._files.open(path, "wb") as out:
                    out.write(content)
                self._files.invalidate_cache()
                if (size := self._files.size(path)) in (None, len(content)):  # None: it does not tell
                    return
                raise OSError(f"{path} has {size} bytes there, not {len(content)}")
            except OSError:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(PAUSE)

    def _remove(self, path: str) -> None:
        if self._files.exists(path):
            self._files.rm_file(path)

    def _whole(self) -> list[dict[str, Any]]:
        """The records of the slots that were written to their end; what cannot be read is no slot."""
        out = []
        for slot in range(SLOTS):
            try:
                with self._files.open(f"{self._root}/slot-{slot}/{DONE}", "rb") as source:
                    done = json_reader.parse(source.read())
                if done["format"] == FORMAT and isinstance(done["files"], dict) and int(done["step"]) >= 0:
                    out.append({**done, "slot": slot})
            except Exception:  # absent, torn, or the storage is gone: training goes on without
                continue
        return out

    def _fetch(self, done: dict[str, Any], path: Path) -> None:
        """Write a slot's files below ``path``, each compared with its hash, run.json last."""
        for name, known in sorted(done["files"].items(), key=lambda item: item[0] == "run.json"):
            inside = PurePosixPath(name)
            if not atomic.is_inside(name):
                raise ValueError(f"{name!r} leads out of the run folder")
            with self._files.open(f"{self._root}/slot-{done['slot']}/{name}", "rb") as source:
                content = source.read()
            if hashlib.sha256(content).hexdigest() != known["sha256"]:
                raise ValueError(f"{name} is not as {DONE} says")
            target = path.joinpath(*inside.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(target, content)


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url if "://" in url else str(Path(url).expanduser().absolute()))
    except (ImportError, ValueError) as error:
        raise RunError(
            "run-foreign-files",
            f"the mirror cannot be opened: {error}",
            where=url,
            received=url,
            allowed="a folder, hf://…, s3://…, or another address that fsspec opens",
            fix="name a folder, hf://… or s3://…",
        ) from error
    return files, str(root).rstrip("/")


def _name(folder: RunFolder) -> str:
    """What tells one run from another: the same config, data and base are the same run, wherever it was begun."""
    lock = folder.lock
    assert lock is not None, "a run is mirrored from its lock on"
    parts = (lock.config_hash, lock.data_hash, lock.base_hash, lock.tokenizer_hash, lock.template_hash, lock.start_hash)
    return f"{folder.record.get('name')} {hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}"


def _gather(folder: Path, checkpoint: Path, linked: Path) -> None:
    """What a slot holds, as links: the run may delete and replace its own files while they are copied."""
    for path in _wanted(folder, checkpoint):
        target = linked / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "metrics.jsonl":  # the one that is appended to
            shutil.copy2(path, target)
            continue
        try:
            os.link(path, target)
        except OSError:
            shutil.copy2(path, target)


def _wanted(folder: Path, checkpoint: Path) -> Iterator[Path]:
    """The records, the start, the checkpoint, the best one that it knows of, the trained model."""
    best = json_reader.read(checkpoint / "state.json")["hooks"]["best"]["step"]
    kept = {checkpoint, *([checkpoint.with_name(f"step-{best:06d}")] if best is not None else [])}
    for one in (*(folder / name for name in (*RECORDS, START, "adapter", "weights")), *sorted(kept)):
        if one.is_dir():
            yield from (path for path in one.iterdir() if path.is_file())
        elif one.is_file():
            yield one
