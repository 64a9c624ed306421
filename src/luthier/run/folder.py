"""A run folder: what is in it, when it may be made, continued, or read.

run.json            state and lock; written first
config.yaml plan.json audit.json data.json rows.hash metrics.jsonl report.html
start.safetensors   the factors that LoRA began with, where they are not drawn
checkpoints/        step-000120/ …
adapter/            the trained adapter (PEFT format), or
weights/            the whole model, when all of it was trained
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from luthier import json_reader
from luthier.errors import RunError
from luthier.run import atomic
from luthier.run.lock import Lock, diff
from luthier.run.metrics import MetricsWriter
from luthier.run.oslock import NAME as WRITING
from luthier.run.oslock import FolderLock

FORMAT = 1
SPARE = 1.1  # times what will be written has to be free
MOST = 20  # lines of differences that are told
ADAPTER, WEIGHTS = "adapter", "weights"  # of these two, a finished run has one
START = "start.safetensors"
State = Literal["preparing", "training", "interrupted", "failed", "finished"]
Standing = Literal["new", "resume", "finished"]


@dataclass
class RunFolder:
    """One run on disk. Make it with `open` (to write) or `load` (to read)."""

    path: Path
    record: dict[str, Any]
    _held: FolderLock | None = field(default=None, repr=False)
    _made: tuple[Path, ...] = field(default=(), repr=False)  # folders that `open` made for it, the run's own first

    @classmethod
    def open(cls, path: Path | str | None, *, name: str = "run", root: Path | str = "runs") -> RunFolder:
        """Open ``path`` for writing, or make ``root/<date>-<name>``; run.json is there when this returns.

        Raises RunError: run-foreign-files when ``path`` holds other things, run-in-use when it is being written to.
        """
        missing = _missing(Path(path if path is not None else root))
        folder = Path(path) if path is not None else _fresh(Path(root), f"{time.strftime('%Y-%m-%d')}-{slug(name)}")
        made = missing if path is not None else (folder, *missing)
        if folder.exists() and not folder.is_dir():
            raise RunError(
                "run-foreign-files",
                "the output is a file, not a folder",
                where=str(folder),
                received=f"the file {folder.name}",
                allowed="a folder that is absent or empty, or an unfinished run",
                fix=_OTHER,
            )
        foreign = [] if _is_run(folder) or not folder.exists() else _foreign(folder)
        if foreign:
            raise RunError(
                "run-foreign-files",
                "the output folder holds files that are not of a run; nothing was written",
                where=str(folder),
                received=", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""),
                allowed="a folder that is absent, empty, or an unfinished run of the same config, data and base",
                fix=_OTHER,
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run = cls._held_by_us(folder, name)
        except OSError as error:
            raise not_writable(folder, error) from error
        run._made = made
        return run

    @classmethod
    def _held_by_us(cls, folder: Path, name: str) -> RunFolder:
        held = FolderLock(folder)
        try:
            if _is_run(folder):
                return cls(folder, _read(folder), held)
            run = cls(
                folder, {"format": FORMAT, "state": "preparing", "name": name, "created": _now(), "lock": None}, held
            )
            run._write()
        except BaseException:
            held.release()
            raise
        return run

    @classmethod
    def load(cls, path: Path | str, *, trained: bool = True) -> RunFolder:
        """Open a run to read it; ``path`` may also be a folder inside it, such as Ludwig's ``…/model``.

        Raises RunError run-not-a-run when it is none, or (with ``trained``) when no trained model is in it.
        """
        given = Path(path)
        folder = given if _is_run(given) else given.parent
        if not _is_run(folder) or (folder != given and given.name not in ("model", ADAPTER, WEIGHTS)):
            raise RunError(
                "run-not-a-run",
                "this is not a run folder: it has no run.json" if given.exists() else "there is no such folder",
                where=str(given),
                received=_held_by(given),
                allowed="a folder with run.json",
                fix="name a folder that `luthier train` made; `luthier runs` lists them",
            )
        run = cls(folder, _read(folder))
        if trained and run.model_path is None:
            raise RunError(
                "run-not-a-run",
                f"the run has no trained model: it is {run.state!r}",
                where=str(folder),
                received=f"a run whose state is {run.state!r}",
                allowed="a run that was trained",
                fix=f"go on with it: luthier train {folder / 'config.yaml'} --output {folder}",
            )
        return run

    @property
    def state(self) -> State:
        """Where the run stands."""
        return self.record["state"]  # type: ignore[no-any-return]

    @property
    def lock(self) -> Lock | None:
        """What the run was made from; None while it is preparing."""
        return Lock.from_json(self.record["lock"]) if self.record.get("lock") else None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def start(self) -> Path:
        """The factors that LoRA began with, where they are not drawn: checkpoints go with them."""
        return self.path / START

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.path / ADAPTER

    @property
    def weights(self) -> Path:
        """The folder of the whole trained model, where no adapter was used."""
        return self.path / WEIGHTS

    @property
    def model_path(self) -> Path | None:
        """The trained model: the adapter or the weights, whichever the run made; None when it has made none."""
        return next((folder for folder in (self.adapter, self.weights) if folder.is_dir()), None)

    @property
    def metrics_path(self) -> Path:
        """The metrics.jsonl of the run."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The report.html of the run."""
        return self.path / "report.html"

    @property
    def metrics(self) -> MetricsWriter:
        """The sink that appends to metrics.jsonl."""
        return MetricsWriter(self.metrics_path)

    def complete_lock(self, lock: Lock, inside: Callable[[str], Sequence[str]] = lambda key: ()) -> Standing:
        """Enter the lock: "new" for a new run, "resume" for the same one unfinished, "finished" when it is done.

        ``inside``: see `lock.diff`.
        Raises RunError run-other-lock with the differences when the folder's run was made from something else.
        """
        before = self.lock
        if before is None:
            self._update(lock=lock.to_json(), state="training")
            return "new"
        changed = diff(before, lock, inside)
        if changed:
            more = f"\n          … and {len(changed) - MOST} more" if len(changed) > MOST else ""
            raise RunError(
                "run-other-lock",
                "the folder holds another run; nothing was changed. The differences (folder → now):\n          "
                + "\n          ".join(changed[:MOST])
                + more,
                where=str(self.path),
                received=changed[0],
                allowed="the same config, data and base model",
                fix=f"{_OTHER}; to start a new run from its last checkpoint on purpose: --fork {self.path}",
            )
        if self.state == "finished":
            return "finished"
        self._update(state="training")
        return "resume"

    def mark(self, state: State, **facts: Any) -> None:
        """Enter a state, and facts about it that run.json shall hold (JSON types)."""
        self._update(state=state, **facts)

    def finish(self, **facts: Any) -> None:
        """The run is done and has its model; lets other processes write to the folder."""
        self._update(state="finished", finished=_now(), **facts)
        self.close()

    def discard(self) -> bool:
        """Take away what `open` made, where nothing was begun in it; False where there is something to keep."""
        if not self._made or self.lock is not None:
            return False
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # another run came into a folder above
            for folder in self._made[1:]:
                folder.rmdir()
        return True

    def close(self) -> None:
        """Let go of the folder without a change to it."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def append_plan(self, plan: Mapping[str, Any], why: str, **made: Any) -> None:
        """Record a forced new plan: from here on the run repeats up to rounding, no longer bit for bit.

        ``made``: what else the plan follows from and differs from the lock: ``machine``, ``execution`` (JSON types).
        """
        entry = {"at": _now(), "why": why, "plan": dict(plan), **made}
        self._update(replanned=[*self.record.get("replanned", []), entry])
        self.write_plan(plan)

    def append_rewind(self, step: int, failed: int, why: str) -> None:
        """Record that training went back to ``step`` after step ``failed``."""
        entry = {"at": _now(), "step": step, "failed": failed, "why": why}
        self._update(rewound=[*self.record.get("rewound", []), entry])

    def planned_for(self, name: str, first: Any) -> Any:
        """What the plan in force was made for (``machine``, ``execution``); ``first`` where it was never changed."""
        return next((one[name] for one in reversed(self.record.get("replanned", [])) if name in one), first)

    def write_config(self, text: str) -> None:
        """Write config.yaml, the resolved config."""
        atomic.write_text(self.path / "config.yaml", text)

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Write plan.json."""
        atomic.write_json(self.path / "plan.json", dict(plan))

    def write_audit(self, audit: Mapping[str, Any]) -> None:
        """Write audit.json."""
        atomic.write_json(self.path / "audit.json", dict(audit))

    def read_json(self, name: str) -> Any:
        """One of the run's JSON files. Raises RunError run-damaged when it is missing or cannot be parsed."""
        return read_record(self.path / name)

    def _update(self, **changes: Any) -> None:
        self.record = {**self.record, **changes}
        self._write()

    def _write(self) -> None:
        atomic.write_json(self.path / "run.json", self.record)


def not_writable(folder: Path, error: Exception) -> RunError:
    """What is said when a run folder does not take what is written; a full disk is said as one."""
    if atomic.is_full(error):
        return RunError(
            "run-no-space",
            f"the run folder cannot be written to: {error}",
            where=str(folder),
            received="a full disk",
            fix=f"make room on the disk (or raise `ulimit -f`), then: luthier train --resume {folder}",
        )
    return RunError(
        "run-not-writable",
        f"the run folder cannot be written to: {getattr(error, 'strerror', None) or error}",
        where=str(getattr(error, "filename", None) or folder),
        received=getattr(error, "strerror", None) or str(error),
        fix="choose an --output folder on a disk that you may write to; a run that has begun goes on once it can be "
        f"written to again: luthier train --resume {folder}",
    )


_OTHER = "choose another --output folder, or leave --output out for a new one under runs/"


def list_runs(root: Path | str = "runs") -> list[RunFolder]:
    """The runs directly in ``root``, oldest first; damaged ones raise, other folders are passed over."""
    base = Path(root)
    found = [RunFolder.load(one, trained=False) for one in base.iterdir() if _is_run(one)] if base.is_dir() else []
    return sorted(found, key=lambda run: (str(run.record.get("created", "")), run.path.name))


def numbered(root: Path | str, prefix: str = "run") -> Path:
    """Make and return the next of ``root/run-0``, ``root/run-1``, …, as Ludwig's results folder has them."""
    base = Path(root)
    base.mkdir(parents=True, exist_ok=True)
    taken = [int(m[1]) for one in base.iterdir() if (m := re.fullmatch(re.escape(prefix) + r"-(\d+)", one.name))]
    number = max(taken, default=-1) + 1
    while True:
        try:
            (base / f"{prefix}-{number}").mkdir()
        except FileExistsError:  # another process was faster
            number += 1
        else:
            return base / f"{prefix}-{number}"


def require_space(path: Path | str, size: int) -> None:
    """Raises RunError run-no-space unless the disk of ``path`` has ``size`` bytes free and a tenth to spare."""
    where = Path(path).absolute()
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free < SPARE * size:
        raise RunError(
            "run-no-space",
            "there is not enough disk space for what the run will write",
            where=str(path),
            received=f"{sized(free)} free",
            allowed=f"at least {sized(SPARE * size)}",
            fix="free some space, choose --output on another disk, or lower trainer.keep_last",
        )


def sized(size: float) -> str:
    """Bytes in words, small ones too."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def slug(name: str) -> str:
    """``name`` as a folder name on every system; letters of any script stay."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:60] or "run"


def _fresh(root: Path, name: str) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(root, error) from error
    number = 1
    while True:
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _missing(folder: Path) -> tuple[Path, ...]:
    """The folder and those above it that are not there, from the inside out."""
    return tuple(one for one in (folder, *folder.parents) if not one.exists())


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _held_by(place: Path) -> str:
    """What stands where a run folder was looked for."""
    if not place.is_dir():
        return "a file" if place.exists() else "nothing"
    return ", ".join(sorted(one.name for one in place.iterdir())[:5]) or "an empty folder"


def _foreign(folder: Path) -> list[str]:
    """What is in a folder beside the traces of a run that died before its run.json was there."""
    ours = (WRITING, ".run.json.")
    return sorted(one.name for one in folder.iterdir() if not one.name.startswith(ours))


def _read(folder: Path) -> dict[str, Any]:
    record = read_record(folder / "run.json")
    if not isinstance(record, dict) or not isinstance(record.get("format"), int) or "state" not in record:
        raise RunError(
            "run-foreign-files",
            "run.json is not one of Luthier's",
            where=str(folder),
            received=record,
            allowed="an object with format and state",
            fix=_OTHER,
        )
    if record["format"] > FORMAT:
        raise RunError(
            "run-not-a-run",
            "the run was written by a newer Luthier",
            where=str(folder / "run.json"),
            received=f"format {record['format']}",
            allowed=f"format {FORMAT} and older",
            fix="pip install --upgrade luthier",
        )
    return record


def read_record(path: Path, fix: str = "restore the file from a copy, or start a new run in another folder") -> Any:
    """What a JSON file that Luthier wrote holds. Raises RunError run-damaged, with ``fix`` as what mends it."""
    try:
        return json_reader.read(path)
    except ValueError as error:
        raise RunError(
            "run-damaged",
            f"{path.name} cannot be read: {error}",
            where=str(path),
            received=str(error),
            allowed="the JSON that Luthier wrote",
            fix=fix,
        ) from error


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
