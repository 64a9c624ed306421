"""Kills and signals in what comes after the steps: merging, card, report, evaluation, conversion.

What is to be made is there whole or not at all, and the same command makes it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
from cases import PROMPT, STEPS, Bench, Row, differences

from luthier.run import RunFolder
from luthier.run.verify import verify

MERGING = "adapter={type: lora, r: 4, dropout: 0.1, postprocessor: {merge_adapter_into_base_model: true}}"
SHOWN = ("evaluation.json", "report.html", "adapter/README.md")  # what an evaluation writes


def kill_at_write(number: int) -> children.Fault:
    """SIGKILL before something is copied, brought to the disk, renamed or removed for the ``number``-th time.

    0: only count.
    """

    def put() -> None:
        made = [0]

        def count(*_: Any, **__: Any) -> None:
            made[0] += 1
            if number:
                if made[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            else:
                Path(WORK[0], "writes").write_text(str(made[0]))

        for owner, names in ((os, ("fsync",)), (Path, ("rename", "replace")), (shutil, ("copyfile", "rmtree"))):
            for name in names:
                children.around(owner, name, count)

    return put


def signal_at(place: Callable[[], tuple[Any, str]], number: int) -> children.Fault:
    """A signal as soon as a function of Luthier is called."""

    def put() -> None:
        def send(*_: Any, **__: Any) -> None:
            Path(WORK[0], "signalled").write_text(str(time.time()))
            os.kill(os.getpid(), number)
            time.sleep(0.02)

        children.around(*place(), send)

    return put


WORK = [""]  # the folder of the bench, for what a fault notes
Told = Callable[[], list[str]]  # what is not as it should be


def _ended_anywhere(
    bench: Bench, row: Row, count: int, fresh: Callable[[], None], start: Callable[..., children.Child],
    whole: Told, equal: Told,
) -> None:  # fmt: skip
    """SIGKILL at random times, every other one between two writes, spread over all of them; then the same command."""
    fresh()
    (bench.root / "writes").unlink(missing_ok=True)
    WORK[0] = str(bench.root)
    began = time.monotonic()
    child = start(fault=kill_at_write(0))
    assert child.wait() == 0, child.output()[-2000:]
    seconds, writes = time.monotonic() - began, int((bench.root / "writes").read_text())
    parts = -(-count // 2)
    places = [1 + int(writes * (part + bench.draw.random()) / parts) for part in range(parts)]
    bench.draw.shuffle(places)
    while row.asked < count:
        fresh()
        if row.asked % 2 == 0:  # a run may have fewer writes than the one that was counted: then anywhere
            place = places.pop() if places else bench.draw.randrange(1, writes + 1)
            at, code = f"write {place} of {writes}", start(fault=kill_at_write(place)).wait()
        else:
            child = start()
            time.sleep(wait := bench.draw.uniform(0, seconds))
            at, code = f"{wait:.2f} of {seconds:.2f} s", child.kill()
        if code == 0:
            continue  # it was over before
        wrong = [f"after the kill: {line}" for line in whole()] + ([] if code == -9 else [f"exit {code}"])
        child = start()
        ended = child.wait()
        wrong += equal() if ended == 0 else [f"again: exit {ended}: {child.output()[-500:]}"]
        row.count(not wrong, f"{at}: {'; '.join(wrong)}")


def _signalled(
    bench: Bench, row: Row, rounds: int, fresh: Callable[[], None], start: Callable[..., children.Child],
    places: dict[str, Callable[[], tuple[Any, str]]], hint: str, equal: Told,
) -> None:  # fmt: skip
    """SIGTERM and SIGINT in each of these places: soon over, exit code, hint, no traceback; then the same command."""
    slowest, WORK[0] = 0.0, str(bench.root)
    for number in (signal.SIGTERM, signal.SIGINT) * rounds:
        for name, place in places.items():
            fresh()
            child = start(fault=signal_at(place, number))
            code, said = child.wait(), child.output()
            slowest = max(slowest, seconds := time.time() - float((bench.root / "signalled").read_text()))
            wrong = [] if code == 128 + number and "Traceback" not in said else [f"exit {code}: {said[-300:]}"]
            wrong += [] if hint in said else ["no hint"]
            wrong += [] if seconds < PROMPT else [f"it took {seconds:.1f} s"]
            child = start()
            ended = child.wait()
            wrong += equal() if ended == 0 else [f"again: exit {ended}: {child.output()[-500:]}"]
            row.count(not wrong, f"{number} in {name}: {'; '.join(wrong)}")
    row.notes.append(f"the slowest took {slowest:.1f} s from the signal to its end")


def _files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by name."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in sorted(folder.rglob("*")) if one.is_file()}


# -------------------------------------------------------------------------------------------------------- finishing


def finishing(bench: Bench, count: int) -> list[Row]:
    """A run whose last step is taken: its adapter, merged weights, card and report."""
    kill = Row("2", "SIGKILL while adapter, merged weights, card, report are written: whole or absent, again: equal")
    sent = Row("2", "SIGTERM and SIGINT while merging, writing card and report: saved, prompt, again: equal")
    options = ("--set", MERGING)
    straight = bench.root / "merging"
    if not straight.exists():
        code, said = bench.train("merging", *options)
        assert code == 0, said[-2000:]
    merged, adapter = _files(straight / "merged"), _files(straight / "adapter")
    bench.fresh()
    code, said = bench.train("run", *options, fault=children.exit_when_merging())
    assert code == 77, said[-2000:]
    kept = bench.root / "unfinished"
    shutil.rmtree(kept, ignore_errors=True)
    (bench.root / "run").rename(kept)
    unwritten, written = _card_of(kept), _card_of(straight)  # PEFT saves a page to be filled in with an adapter
    assert written is not None and written != unwritten

    def fresh() -> None:
        bench.fresh()
        shutil.copytree(kept, bench.root / "run")

    def start(fault: children.Fault | None = None) -> children.Child:
        return bench.start("run", *options, fault=fault)

    def whole() -> list[str]:
        run = bench.root / "run"
        found = [line for one in verify(RunFolder.load(run, trained=False)) for line in one.faults]
        found += [] if not (run / "merged").exists() or _files(run / "merged") == merged else ["merged/ is torn"]
        found += [] if _card_of(run) in (None, unwritten, written) else ["the card is torn"]
        page = run / "report.html"
        found += [] if not page.exists() or page.read_text("utf-8").rstrip().endswith("</html>") else ["report torn"]
        return found

    def equal() -> list[str]:
        run = bench.root / "run"
        out = differences(bench.load("run", STEPS), bench.load("merging", STEPS)) + bench.litter("run")
        out += [] if _files(run / "merged") == merged else ["merged/ is another"]
        mine = _files(run / "adapter")
        out += [f"adapter/{name}" for name in adapter if mine.get(name) != adapter[name] and name != "README.md"]
        out += [] if bench.metrics("run") == bench.metrics("merging") else ["metrics"]
        out += [] if json.loads((run / "run.json").read_text())["state"] == "finished" else ["not finished"]
        out += [] if _card_of(run) == written else ["the card is another"]
        return out + ([] if (run / "report.html").is_file() else ["no report.html"])

    _ended_anywhere(bench, kill, count, fresh, start, whole, equal)
    hint = "to go on: luthier train --resume"
    _signalled(bench, sent, max(1, count // 10), fresh, start, _PLACES_OF_FINISHING, hint, equal)
    return [kill, sent]


def _card_of(run: Path) -> str | None:
    """The model card without its title, which is the name of the run's folder; None where there is none."""
    path = run / "adapter" / "README.md"
    return path.read_text(encoding="utf-8").replace(f"\n# {run.name}\n", "\n") if path.is_file() else None


def _merge() -> tuple[Any, str]:
    from luthier.export import merge

    return merge, "_merge"


def _merged_to_disk() -> tuple[Any, str]:
    from luthier.export import merge

    return merge, "growing"


def _report() -> tuple[Any, str]:
    from luthier.evaluate import report

    return report, "write_report"


def _card() -> tuple[Any, str]:
    from luthier.export import card

    return card, "write_card"


def _report_to_disk() -> tuple[Any, str]:
    from luthier.run import atomic

    return atomic, "_take_place"


_PLACES_OF_FINISHING = {"merge": _merge, "writing it": _merged_to_disk, "report": _report, "card": _card}


# ------------------------------------------------------------------------------------------------------- evaluating


def evaluating(bench: Bench, count: int) -> list[Row]:
    """`luthier evaluate` of a finished run."""
    kill = Row("2", "SIGKILL of evaluate: results, report, card each old or new, the model whole, again: equal")
    sent = Row("2", "SIGTERM and SIGINT while evaluate loads, answers, writes: prompt, again: equal")
    before = bench.root / "straight"
    run = bench.root / "run"

    def fresh() -> None:
        bench.fresh()
        shutil.copytree(before, run)

    def start(fault: children.Fault | None = None) -> children.Child:
        asked = ("run", "--rows", "6", "--samples", "1")
        return children.start(bench.root, *asked, command="evaluate", fault=fault)

    def shown() -> dict[str, bytes | None]:
        return {name: (run / name).read_bytes() if (run / name).exists() else None for name in SHOWN}

    fresh()
    old = shown()
    child = start()
    assert child.wait() == 0, child.output()[-2000:]
    new = shown()
    assert all(new[name] is not None and new[name] != old[name] for name in SHOWN), "an evaluation changes all of them"

    def whole() -> list[str]:
        found = [line for one in verify(RunFolder.load(run)) for line in one.faults]
        return found + [f"{name} is torn" for name, text in shown().items() if text not in (old[name], new[name])]

    def equal() -> list[str]:
        return [f"{name} is another" for name, text in shown().items() if text != new[name]] + bench.litter("run")

    _ended_anywhere(bench, kill, count, fresh, start, whole, equal)
    hint = "the same command does it again"
    _signalled(bench, sent, max(1, count // 10), fresh, start, _PLACES_OF_EVALUATING, hint, equal)
    return [kill, sent]


def _load() -> tuple[Any, str]:
    from luthier.pipeline import loading

    return loading, "open_tuned"


def _answer() -> tuple[Any, str]:
    from luthier.tuned import comparing

    return comparing, "few_shot"


def _compare() -> tuple[Any, str]:
    from luthier.tuned import comparing

    return comparing, "compare"


_PLACES_OF_EVALUATING = {
    "load": _load, "answers": _answer, "comparison": _compare, "report": _report, "its rename": _report_to_disk,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- converting


def converting(bench: Bench, count: int) -> list[Row]:
    """`luthier convert` of pickled weights, whose child process must not outlive it."""
    row = Row("2", "SIGKILL of convert: the new folder whole or absent, again: equal, nothing left beside it")
    source, made = bench.root / "pickled", bench.root / "pickled-safetensors"
    _in_a_child(lambda: _pickle(bench.base, source))

    def fresh() -> None:
        for left in bench.root.glob("pickled-safetensors*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def start(fault: children.Fault | None = None) -> children.Child:
        return children.start(bench.root, "pickled", command="convert", fault=fault)

    fresh()
    child = start()
    assert child.wait() == 0, child.output()[-2000:]
    wanted = _files(made)

    def whole() -> list[str]:
        return [] if not made.exists() or _files(made) == wanted else ["the folder is torn"]

    def equal() -> list[str]:
        beside = [one.name for one in bench.root.glob("*pickled-safetensors*") if one != made]
        return whole() + beside + ([] if made.exists() else ["nothing was made"])

    _ended_anywhere(bench, row, count, fresh, start, whole, equal)
    return [row]


def _in_a_child(do: Callable[[], None]) -> None:
    """Compute in another process: this one has to stay without threads, as it is forked from."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            do()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _pickle(base: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(base, target)
    weights = target / "model.safetensors"
    torch.save(load_file(weights), target / "pytorch_model.bin")
    weights.unlink()


CASES: dict[str, Callable[[Bench, int], list[Row]]] = {
    "finishing": finishing, "evaluating": evaluating, "converting": converting,
}  # fmt: skip
SHORT = {"finishing": 2, "evaluating": 2, "converting": 1}
LONG = {"finishing": 40, "evaluating": 40, "converting": 10}
