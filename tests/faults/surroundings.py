"""What the surroundings of a run may do to it: mirrors, small disks, memory, files that vanish, folders that close."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import children
from cases import ALIKE, INTERVAL, NO_DROPOUT, STEPS, Bench, Row

SMALL = 6 << 20  # bytes of the small disk


def mirror(bench: Bench, count: int) -> list[Row]:
    """A drive that tears and loses writes; the machine is killed and replaced by an empty one, again and again."""
    row = Row("-", "mirror on a drive that tears and loses writes, SIGKILL, a new machine: resumed from it, end equal")
    gone = Row("-", "mirror lost while training: a warning, the run ends equal")
    killed = tries = 0
    while row.asked < count:
        tries, before = tries + 1, killed
        run, drive = bench.fresh(), bench.root / "drive"
        shutil.rmtree(drive, ignore_errors=True)
        wrong, kills = [], bench.draw.randrange(1, 4)
        for attempt in range(kills + 1):
            fault = children.faulty_mirror(bench.draw.randrange(10**6))
            child = bench.start(run, "--mirror", str(drive), fault=fault)
            if attempt < kills:
                _wait_for_a_copy(bench, child, drive)
                if child.kill() == -9:
                    killed += 1
                    shutil.rmtree(bench.root / run, ignore_errors=True)  # the new machine has nothing
                    continue
            code, said = child.wait(), child.output()
            if attempt and "taken from" not in said:
                wrong.append("begun anew")
            wrong += bench.unlike(run) if code == 0 else [f"exit {code}: {said[-300:]}"]
            break
        if killed == before and tries < 10 * count:
            continue  # it was over before the signal came: nothing was shown
        wrong += [] if killed > before else ["over before every signal"]
        row.count(not wrong, f"run {tries}: {', '.join(wrong)}")
    row.notes.append(f"{killed} kills once the mirror had a copy; every tenth write torn, half of them silently")
    for _ in range(max(1, count // 5)):
        run, drive = bench.fresh(), bench.root / "drive"
        shutil.rmtree(drive, ignore_errors=True)
        step = bench.draw.randrange(INTERVAL + 1, STEPS - INTERVAL)
        code, said = bench.train(run, "--mirror", str(drive), fault=children.lost_mirror(drive, step))
        wrong = bench.unlike(run) if code == 0 else [f"exit {code}: {said[-300:]}"]
        wrong += [] if "training goes on" in said else ["no warning"]
        gone.count(not wrong, ", ".join(wrong))
        drive.unlink(missing_ok=True)
    return [row, gone]


def _wait_for_a_copy(bench: Bench, child: children.Child, drive: Path) -> None:
    """Until the drive has a whole copy, and then a random time longer."""
    while child.poll() is None and not any(drive.glob("slot-*/done.json")):
        time.sleep(0.002)
    end = time.monotonic() + bench.seconds * 0.5 * bench.draw.random()
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


@contextmanager
def _small_disk(bench: Bench) -> Iterator[Path | None]:
    """A file system of 6 MB in memory; None where this process may not mount one."""
    place = bench.root / "small"
    place.mkdir(exist_ok=True)
    made = shutil.which("mount") and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(place)], capture_output=True
    ).returncode  # fmt: skip
    try:
        yield place if made else None
    finally:
        if made:
            subprocess.run(["umount", str(place)], check=True)


def small_disk(bench: Bench, rounds: int) -> list[Row]:
    """A disk that fills up in the middle of a save, and one that is too small from the start."""
    row = Row("4", "a 6 MB disk that fills up in a save: exit 5, the one before whole, no litter, goes on equal")
    early = Row("4", "a 6 MB disk with too little room for the run: refused before the first step")
    with _small_disk(bench) as place:
        if place is None:
            row.notes.append("skipped: mounting a tmpfs takes root")
            return [row]
        run, filler = "small/run", place / "filler"
        for _ in range(rounds):
            bench.fresh()
            shutil.rmtree(place / "run", ignore_errors=True)
            assert bench.train(run, fault=children.exit_in_step(2 * INTERVAL + 1))[0] == 77
            before = bench.steps(run)
            code, said = bench.train(run, fault=children.fill_disk(filler, bench.draw.randrange(4096, 40_000)))
            unloadable, torn = bench.torn(run)
            wrong = [*unloadable, *torn, *bench.litter(run)]
            clear = code == 5 and "run-no-space" in said and "Traceback" not in said
            wrong += [] if clear else [f"exit {code} {said[-400:]}"]
            wrong += [] if bench.steps(run) == before else [f"checkpoints {bench.steps(run)}, before {before}"]
            filler.unlink()
            code, said = bench.train(run)
            wrong += bench.unlike(run) if code == 0 else [f"resumed: exit {code}: {said[-300:]}"]
            row.count(not wrong, ", ".join(wrong))
            shutil.rmtree(place / "run")
            free = shutil.disk_usage(place).free
            filler.write_bytes(bytes(free - bench.draw.randrange(60_000, 150_000)))
            code, said = bench.train(run)
            clear = code == 5 and "run-no-space" in said and "Traceback" not in said and "step 1/" not in said
            early.count(clear and not bench.steps(run), f"exit {code} {said[-400:]}")
            filler.unlink()
    return [row, early]


def read_only(bench: Bench, rounds: int) -> list[Row]:
    """A run folder on a file system that is read-only, from the start and when the run goes on."""
    row = Row("-", "a read-only folder: exit 5 (run-not-writable), where and what to do, goes on equal")
    with _small_disk(bench) as place:
        if place is None:
            row.notes.append("skipped: mounting a tmpfs takes root")
            return [row]
        for _ in range(rounds):
            run = "small/run"
            bench.fresh()
            shutil.rmtree(place / "run", ignore_errors=True)
            assert bench.train(run, fault=children.exit_in_step(bench.draw.randrange(4, STEPS)))[0] == 77
            _remount(place, "ro")
            for name in ("small/other", run):
                code, said = bench.train(name)
                clear = code == 5 and "run-not-writable" in said and "fix:" in said and "Traceback" not in said
                row.count(clear, f"{name}: exit {code} {said[-400:]}")
            _remount(place, "rw")
            code, said = bench.train(run)
            unlike = bench.unlike(run) if code == 0 else [f"resumed: exit {code}: {said[-300:]}"]
            row.count(not unlike, ", ".join(unlike))
    return [row]


def _remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def vanished(bench: Bench, rounds: int) -> list[Row]:
    """The dataset or the base is gone when a run goes on; put back, it ends equal."""
    row = Row("-", "the dataset or the base has vanished: exit 3 or 4 and its path; back again, it goes on equal")
    for _ in range(rounds):
        for what, said_as, code_wanted in ((bench.root / "rows.csv", "rows.csv", 3), (bench.base, str(bench.base), 4)):
            run = bench.fresh()
            assert bench.train(run, fault=children.exit_in_step(bench.draw.randrange(4, STEPS)))[0] == 77
            away = what.rename(what.with_name("away"))
            code, said = bench.train(run)
            away.rename(what)
            clear = code == code_wanted and said_as in said and "fix:" in said and "Traceback" not in said
            wrong = [] if clear else [f"exit {code}: {said[-400:]}"]
            code, said = bench.train(run)
            wrong += bench.unlike(run) if code == 0 else [f"resumed: exit {code}: {said[-300:]}"]
            row.count(not wrong, f"{what.name}: {', '.join(wrong)}")
    return [row]


def host_memory(bench: Bench, rounds: int) -> list[Row]:
    """The host has no memory left (RLIMIT_AS) while loading, in a step, in an evaluation."""
    row = Row("-", "no host memory (RLIMIT_AS) in load, step, evaluation: exit 6, checkpoints whole, goes on equal")
    worst = 0.0
    bench.without_dropout()
    for _ in range(rounds):
        for phase in ("load", "step", "evaluation"):
            run, step = bench.fresh(), bench.draw.randrange(4, STEPS - 8)
            options = () if phase == "load" else NO_DROPOUT
            code, said = bench.train(run, *options, fault=children.no_host_memory(phase, step))
            unloadable, torn = bench.torn(run)
            wrong = [*unloadable, *(() if options else torn)]  # the straight checkpoints are of another adapter
            clear = code == 6 and "training-no-memory" in said and "fix:" in said and "Traceback" not in said
            wrong += [] if clear else [f"exit {code}: {said[-400:]}"]
            code, said = bench.train(run, *options)
            if phase != "load":  # it has tried smaller passes, and keeps to them: equal to rounding
                same = code == 0 and bench.rows_taken() == bench.samples and bench.replanned(run)
                wrong += [] if same else [f"resumed: exit {code}: {said[-300:]}"]
                worst = max(worst, gap := bench.gap(run))
                wrong += [] if gap <= ALIKE else [f"a loss is {gap:.1e} off"]
            else:
                wrong += bench.unlike(run) if code == 0 else [f"resumed: exit {code}: {said[-300:]}"]
            row.count(not wrong, f"{phase} {step}: {', '.join(wrong)}")
    row.notes.append(
        f"after a step or an evaluation the plan is a leaner one, recorded: the same rows, losses within {worst:.1e}"
    )
    return [row]


def again(bench: Bench, rounds: int) -> list[Row]:
    """The same lock in two fresh processes: the same bytes of everything that is learned."""
    row = Row("16", "the same config and data in two fresh processes: every artefact has the same sha256")
    for _ in range(rounds):
        made = []
        for name in ("run", "twin"):
            shutil.rmtree(bench.root / name, ignore_errors=True)
            assert bench.train(name)[0] == 0
            manifests = sorted((bench.root / name).rglob("manifest.json"))
            files = {str(one.relative_to(bench.root / name)): json.loads(one.read_text())["files"] for one in manifests}
            made.append({f"{at}/{one}": known["sha256"] for at, of in files.items() for one, known in of.items()})
        differ = [name for name in made[0].keys() | made[1].keys() if made[0].get(name) != made[1].get(name)]
        row.count(not differ and len(made[0]) > 8, ", ".join(differ))
        shutil.rmtree(bench.root / "twin")
    row.notes.append("every file of the checkpoints and of the adapter")
    return [row]


CASES: dict[str, Callable[[Bench, int], list[Row]]] = {
    "mirror": mirror, "small-disk": small_disk, "read-only": read_only, "vanished": vanished,
    "host-memory": host_memory, "again": again,
}  # fmt: skip
SHORT = {"mirror": 1, "small-disk": 1, "read-only": 1, "vanished": 1, "host-memory": 1, "again": 1}
LONG = {"mirror": 20, "small-disk": 5, "read-only": 3, "vanished": 3, "host-memory": 5, "again": 5}
