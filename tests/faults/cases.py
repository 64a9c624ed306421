"""What is done to runs, and what has to hold afterwards. Every case returns its figures: what was asked, what held."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import children
import torch

from luthier.errors import RunError
from luthier.run import read_metrics
from luthier.train import checkpoint

INTERVAL = 3  # steps between checkpoints
STEPS = 24
ALIKE = 1e-6  # of a loss, relative, in fp32
TIMED = ("time", "tokens_per_s", "memory_gib")
LORA = {"type": "lora", "r": 4, "dropout": 0.1}
NO_DROPOUT = ("--set", "adapter={type: lora, r: 4, dropout: 0}")


BEGUN: list[Row] = []  # every line of this process, so that a case that fails on the way has told of what it did


@dataclass
class Row:
    """A line of the table."""

    number: str
    what: str
    asked: int = 0
    held: int = 0
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        BEGUN.append(self)

    @property
    def failed(self) -> bool:
        """Whether something did not hold, or nothing was tried and no note says why."""
        return self.held != self.asked or not (self.asked or self.notes)

    def count(self, ok: bool, said: str = "") -> None:
        """One more attempt."""
        self.asked += 1
        self.held += ok
        if not ok:
            self.wrong.append(said)


class Bench:
    """A place with a base, a table and a config, and one run that nothing happened to."""

    def __init__(self, root: Path, engine: str, seed: int, name: str) -> None:
        adapter = None if name == "all-weights" else LORA
        self.result = "weights" if adapter is None else "adapter"
        self.root, self.engine, self.draw = root / engine / name, engine, random.Random(f"{engine} {name} {seed}")
        self.root.mkdir(parents=True)
        self.base = shutil.copytree(root / "base", self.root / "base")
        lines = ["question,answer", *(f"what is {i} and {i * 7}?,{'yes ' * (1 + i % 5)}{i}" for i in range(60))]
        (self.root / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = {
            "base_model": str(self.base),
            "dataset": "rows.csv",
            "prompt": {"template": "{question}\n"},
            "adapter": adapter,
            "trainer": {
                "train_steps": STEPS, "batch_size": 6, "precision": "fp32", "steps_per_checkpoint": INTERVAL,
                "steps_per_evaluation": 8, "eval_generation_rows": 2, "early_stop": -1,
                "learning_rate": 3e-3, "keep_last": 3,
            },
            "generation": {"max_new_tokens": 6},
            "execution": {"model": engine, "device": "cpu"},
        }  # fmt: skip
        (self.root / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
        began = time.monotonic()
        code, _ = self.train("straight", "--set", "trainer.keep_last=99")
        assert code == 0, (self.root / "child.log").read_text()[-3000:]
        self.seconds = time.monotonic() - began
        self.samples = self.rows_taken()
        self.checkpoints = {step: self.load("straight", step) for step in self.steps("straight")}

    def start(self, run: str, *more: str, fault: children.Fault | None = None) -> children.Child:
        """Begin or continue a run."""
        return children.start(self.root, "config.yaml", "--output", run, *more, fault=fault)

    def train(self, run: str, *more: str, fault: children.Fault | None = None) -> tuple[int, str]:
        """The same to its end: exit code and output."""
        child = self.start(run, *more, fault=fault)
        return child.wait(), child.output()

    def load(self, run: str, step: int) -> checkpoint.Checkpoint:
        """A checkpoint, every byte of it compared with its manifest."""
        return checkpoint.load(self.root / run / "checkpoints", step)

    def steps(self, run: str) -> list[int]:
        """The checkpoints that a run has."""
        return checkpoint.steps_in(self.root / run / "checkpoints")

    def rows_taken(self) -> dict[tuple[int, int], list[int]]:
        """The rows of each step as they were taken last; begins anew."""
        path = self.root / "samples.jsonl"
        out = {(epoch, step): rows for epoch, step, rows in map(json.loads, path.read_text().splitlines())}
        path.unlink()
        return out

    def fresh(self) -> str:
        """Remove the run of the last attempt."""
        shutil.rmtree(self.root / "run", ignore_errors=True)
        (self.root / "samples.jsonl").unlink(missing_ok=True)
        (self.root / "signalled").unlink(missing_ok=True)
        (self.root / "copies").unlink(missing_ok=True)
        return "run"

    def torn(self, run: str) -> tuple[list[str], list[str]]:
        """What does not load of a run's checkpoints, and what loads but is not the state of its step."""
        unloadable, torn = [], []
        for step in self.steps(run):
            try:
                found = self.load(run, step)
            except RunError as error:
                unloadable.append(str(error))
                continue
            if step in self.checkpoints:  # one that was written because the run had to end has no like
                torn += [f"step {step}: {line}" for line in differences(found, self.checkpoints[step])]
        return unloadable, torn

    def unlike(self, run: str) -> list[str]:
        """In what a finished run differs from the straight one: weights, optimizer, RNG, samples, metrics, adapter."""
        out = differences(self.load(run, STEPS), self.checkpoints[STEPS])
        for path in sorted((self.root / "straight" / self.result).iterdir()):
            same = (self.root / run / self.result / path.name).read_bytes() == path.read_bytes()
            out += [] if same or path.name == "README.md" else [f"{self.result}/{path.name}"]
        out += [] if self.rows_taken() == self.samples else ["samples"]
        left, right = self.metrics(run), self.metrics("straight")
        return out + ([] if left == right else ["metrics"]) + self.litter(run)

    def without_dropout(self) -> list[float]:
        """The losses of a straight run whose sums do not depend on how its batches are cut up, but for rounding."""
        path = self.root / "without-dropout" / "metrics.jsonl"
        if not path.exists():
            code, said = self.train("without-dropout", *NO_DROPOUT)
            assert code == 0 and self.rows_taken() == self.samples, said[-2000:]
        return [line["loss"] for line in read_metrics(path)]

    def gap(self, run: str) -> float:
        """The largest relative difference of a loss from `without_dropout`; infinite where one is missing."""
        losses, straight = [line["loss"] for line in self.metrics(run)], self.without_dropout()
        gaps = [abs(a - b) / b for a, b in zip(losses, straight, strict=False)]
        return max(gaps) if len(losses) == len(straight) else math.inf

    def replanned(self, run: str) -> bool:
        """Whether it is written in the run that its plan was changed."""
        return bool(json.loads((self.root / run / "run.json").read_text()).get("replanned"))

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without what depends on the clock."""
        lines = read_metrics(self.root / run / "metrics.jsonl")
        return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]

    def litter(self, run: str) -> list[str]:
        """Files that have no business in a run folder."""
        return [str(one) for one in (self.root / run).rglob(".*") if one.name != ".writing"]


def differences(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint) -> list[str]:
    """Parts of two checkpoints that are not equal bit for bit."""
    out = [name for name in a.weights.keys() | b.weights.keys() if not torch.equal(a.weights[name], b.weights[name])]
    return (
        out
        + ([] if _same(a.optimizer, b.optimizer) else ["optimizer"])
        + ([] if _same(dict(a.state), dict(b.state)) else ["state: random numbers, order, hooks or scaler"])
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def make_base(root: Path) -> None:
    """A random two-layer Llama and its tokenizer, in a process of its own: the parent must not compute."""
    import os

    pid = os.fork()
    if pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return
    code = 1
    try:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from conftest import write_llama

        write_llama(root / "base")
        code = 0
    finally:
        os._exit(code)


# ---------------------------------------------------------------------------------------------------------- cases


def kills(bench: Bench, count: int) -> list[Row]:
    """SIGKILL at random times, every other one while a checkpoint is being written; each run goes on until it ends."""
    whole = Row("3", "SIGKILL, half of them inside a save: checkpoints that load and are of one step")
    ended = Row("3", "runs that were killed again and again and ended bit for bit like a straight one")
    most, inside, done, slow = 0, 0, 0, 0
    while done < count:
        run, killed, stalled = bench.fresh(), 0, False
        while done < count:
            child = bench.start(run, fault=children.note_copies)
            aimed = done % 2 == 0
            _wait_to_kill(bench, child, aimed)
            in_save = any((bench.root / run / "checkpoints").glob(".staging-[0-9]*"))
            if child.kill() != -signal.SIGKILL:
                break  # it ended before
            done, killed, inside = done + 1, killed + 1, inside + in_save
            unloadable, torn = bench.torn(run)
            last, copied, kept = _last_step(bench, run), _copied(bench, run), max(bench.steps(run), default=0)
            stalled |= "slower than the steps" in " ".join(child.output().split())
            slow += stalled
            late = last > copied + INTERVAL or (copied > kept + INTERVAL and not stalled)
            wrong = [*unloadable, *torn, *([f"at step {last}, {copied} copied, {kept} whole"] if late else [])]
            whole.count(not wrong, "; ".join(wrong))
            most = max(most, last - kept)
        code, said = (child.code, child.output()) if child.code != -signal.SIGKILL else bench.train(run)
        if killed:
            unlike = bench.unlike(run) if code == 0 else [f"exit {code}: {said[-500:]}"]
            ended.count(not unlike, ", ".join(unlike))
    whole.notes.append(f"{inside} inside a save; at most {most} steps lost, a checkpoint every {INTERVAL} steps")
    whole.notes += [f"{slow} on a disk slower than the steps"] if slow else []
    return [whole, ended]


def _wait_to_kill(bench: Bench, child: children.Child, aimed: bool) -> None:
    end = time.monotonic() + bench.seconds * bench.draw.random()
    folder = bench.root / "run" / "checkpoints"
    seen = bench.draw.randrange(4)  # the first save, or one of those after it
    before: set[str] = set()
    while child.poll() is None:
        if aimed:
            now = {one.name for one in folder.glob(".staging-[0-9]*")} if folder.exists() else set()
            seen -= len(now - before)
            before = now
            if now and seen < 0:
                time.sleep(bench.draw.random() * 0.004)
                return
            time.sleep(0.0003)
        else:
            if time.monotonic() > end:
                return
            time.sleep(0.002)


def _copied(bench: Bench, run: str) -> int:
    """The step of the newest checkpoint that is whole, is being written, or waits for it in memory."""
    path = bench.root / "copies"
    return max([0, *bench.steps(run), *map(int, path.read_text().split() if path.exists() else ())])


def _last_step(bench: Bench, run: str) -> int:
    path = bench.root / run / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0)


def resumes(bench: Bench, count: int) -> list[Row]:
    """Ended in the middle of a random step, gone on with: equal bit for bit."""
    trained = "" if bench.result == "adapter" else ", all weights trained"
    row = Row(
        "1", f"ended in a random step and resumed{trained}: weights, optimizer, RNG, samples, metrics, result equal"
    )
    for _ in range(count):
        run, step = bench.fresh(), bench.draw.randrange(1, STEPS + 1)
        code, said = bench.train(run, fault=children.exit_in_step(step))
        assert code == 77, said[-2000:]
        code, said = bench.train(run)
        unlike = bench.unlike(run) if code == 0 else [f"exit {code}: {said[-500:]}"]
        row.count(not unlike, f"step {step}: {', '.join(unlike)}")
    return [row]


PHASES = ("prepare", "load", "step", "evaluation", "generation", "save", "adapter")
PROMPT = 2.0  # seconds after which a signal must have ended the process; a loaded machine needs some of them


def signals(bench: Bench, rounds: int) -> list[Row]:
    """SIGTERM and SIGINT in every phase: saved, at most one step lost, soon over, exit code and hint, then equal."""
    row = Row("6", "SIGTERM and SIGINT while preparing, loading, in a step, evaluation, generation, save, last save")
    slowest = 0.0
    for number in (signal.SIGTERM, signal.SIGINT) * rounds:
        for phase in PHASES:
            run = bench.fresh()
            step = STEPS if phase == "adapter" else bench.draw.randrange(1, STEPS - 8)
            code, said = bench.train(run, fault=children.signal_in(phase, number, step))
            at, sent = (bench.root / "signalled").read_text().split()
            slowest = max(slowest, seconds := time.time() - float(sent))
            wrong = [] if code == 128 + number else [f"exit {code}"]
            wrong += ["a traceback"] if "Traceback" in said else []
            wrong += [] if max(bench.steps(run), default=0) >= int(at) - 1 else [f"step {at} is lost"]
            wrong += [] if seconds < PROMPT else [f"it took {seconds:.1f} s"]
            state = json.loads((bench.root / run / "run.json").read_text())["state"]
            wrong += [] if state == "interrupted" else [f"state {state}"]
            again = "the same command" if phase == "prepare" else "luthier train --resume"
            wrong += [] if f"to go on: {again}" in said else ["no hint"]
            code, said = bench.train(run)
            wrong += bench.unlike(run) if code == 0 else [f"resumed: exit {code}: {said[-300:]}"]
            row.count(not wrong, f"{number} in {phase} at {at}: {', '.join(wrong)}")
    row.notes.append(f"the slowest took {slowest:.1f} s from the signal to its end")
    return [row]


def twice(bench: Bench, rounds: int) -> list[Row]:
    """A second signal while the first one's checkpoint is written: over at once, and what was whole stays whole."""
    row = Row("6", "a second Ctrl-C while the first one's step goes on: over at once, goes on equal")
    for number in (signal.SIGINT, signal.SIGTERM) * rounds:
        run, step = bench.fresh(), bench.draw.randrange(4, STEPS)
        code, said = bench.train(run, fault=children.signal_twice(number, step))
        seconds = time.time() - float((bench.root / "signalled").read_text())
        unloadable, torn = bench.torn(run)
        wrong = [*unloadable, *torn]
        wrong += [] if code == 128 + number and "Traceback" not in said else [f"exit {code}: {said[-300:]}"]
        wrong += [] if seconds < PROMPT else [f"it took {seconds:.1f} s"]
        code, said = bench.train(run)
        wrong += bench.unlike(run) if code == 0 else [f"resumed: exit {code}: {said[-300:]}"]
        row.count(not wrong, f"{number} twice in {step}: {', '.join(wrong)}")
    return [row]


def corruptions(bench: Bench, count: int) -> list[Row]:
    """A flipped bit, a run of zeros or a cut in the newest checkpoint: named, passed over, and the end is the same."""
    row = Row("5", "bit flips, zeroed runs, cuts in the newest checkpoint: named, passed over, end equal")
    run = bench.fresh()
    code, said = bench.train(run, fault=children.exit_in_step(STEPS - 1))
    assert code == 77, said[-2000:]
    kept = shutil.copytree(bench.root / run, bench.root / "kept", dirs_exist_ok=True)
    samples = (bench.root / "samples.jsonl").read_bytes()
    newest = bench.steps(run)[-1]
    for number in range(count):
        bench.fresh()
        shutil.copytree(kept, bench.root / run)
        (bench.root / "samples.jsonl").write_bytes(samples)
        folder = bench.root / run / "checkpoints" / f"step-{newest:06d}"
        victim = bench.draw.choice(sorted(folder.iterdir()))
        what = _damage(victim, ("flip", "zero", "cut")[number % 3], bench.draw)
        code, said = bench.train(run)
        named = f"step {newest} is damaged" in said and (victim.name in said)
        unlike = bench.unlike(run) if code == 0 else [f"exit {code}: {said[-500:]}"]
        row.count(named and not unlike, f"{what}: {'named' if named else 'not named'}; {', '.join(unlike)}")
    return [row]


def _damage(path: Path, kind: str, draw: random.Random) -> str:
    before = bytes(path.read_bytes())
    while True:
        content, at = bytearray(before), draw.randrange(len(before))
        if kind == "flip":
            content[at] ^= 1 << draw.randrange(8)
        elif kind == "zero":
            content[at : at + 64] = bytes(len(content[at : at + 64]))
        else:
            del content[at:]
        if bytes(content) != before:
            path.write_bytes(bytes(content))
            return f"{kind} at {at} of {path.name}"


def not_finite(bench: Bench, rounds: int) -> list[Row]:
    """NaN in loss, gradient, weights: ended before the update, nothing of it saved."""
    row = Row("10", "NaN in loss, gradient, weights: exit 6 before the update, every checkpoint finite, recorded")
    for _ in range(rounds):
        for where in ("loss", "gradient", "weights"):
            run, step = bench.fresh(), bench.draw.randrange(2, STEPS)
            code, said = bench.train(run, fault=children.spoil(where, step))
            found = [bench.load(run, one) for one in bench.steps(run)]
            finite = all(bool(w.isfinite().all()) for one in found for w in one.weights.values())
            last = _last_step(bench, run)
            ok = code == 6 and "training-not-finite" in said and "Traceback" not in said and finite and last == step - 1
            recorded = _recorded(bench, run, step)
            wrong = f"exit {code}, finite {finite}, last step {last}, recorded {recorded}"
            row.count(ok and recorded, f"{where} in step {step}: {wrong}")
    return [row]


def _recorded(bench: Bench, run: str, step: int) -> bool:
    """Whether the record of the step that failed has its number, its rows, and the last metrics of each split."""
    found = json.loads((bench.root / run / "checkpoints" / "failed-step.json").read_text())
    rows = bench.samples[found["source"]["epoch"], found["source"]["step"]]
    last = {line["split"]: line for line in read_metrics(bench.root / run / "metrics.jsonl")}
    return bool(found["step"] == step and found["rows"] == sorted(rows) and found["metrics"] == list(last.values()))


def memory(bench: Bench, rounds: int) -> list[Row]:
    """Out of memory at a step: the same effective batches in smaller passes, the losses within rounding."""
    row = Row("15", "out of memory at a step: same samples, losses within 1e-6 of each other")
    worst = 0.0
    bench.without_dropout()
    for _ in range(rounds):
        run, step = bench.fresh(), bench.draw.randrange(1, STEPS)
        code, said = bench.train(run, *NO_DROPOUT, fault=children.out_of_memory(step))
        worst = max(worst, gap := bench.gap(run))
        ok = code == 0 and gap <= ALIKE and bench.replanned(run)
        row.count(ok and bench.rows_taken() == bench.samples, f"step {step}: exit {code}, gap {gap:.1e} {said[-300:]}")
    row.notes.append(f"largest relative difference of a loss {worst:.1e}")
    return [row]


def full_disk(bench: Bench, rounds: int) -> list[Row]:
    """Files that may not grow: a clear end, the checkpoint before it whole, no litter, and it goes on afterwards."""
    row = Row("4", "no room in the middle of a save: exit 5, the one before whole, no litter, goes on equal")
    for _ in range(rounds):
        run = bench.fresh()
        assert bench.train(run, fault=children.exit_in_step(2 * INTERVAL + 1))[0] == 77
        before = bench.steps(run)  # of the last one, the write may still have been under way
        # below 12 kB the child could not even write its log, which is a file of this process too
        largest = max(one.stat().st_size for one in (bench.root / run / "checkpoints").rglob("*.safetensors"))
        code, said = bench.train(run, fault=children.small_files(bench.draw.randrange(12_000, largest)))
        unloadable, torn = bench.torn(run)
        wrong = [*unloadable, *torn, *bench.litter(run)]
        clear = code == 5 and "run-no-space" in said and "Traceback" not in said
        wrong += [] if clear else [f"exit {code} {said[-400:]}"]
        wrong += [] if bench.steps(run) == before else [f"checkpoints {bench.steps(run)}, before {before}"]
        code, said = bench.train(run)
        wrong += bench.unlike(run) if code == 0 else [f"resumed: exit {code}: {said[-300:]}"]
        row.count(not wrong, ", ".join(wrong))
    return [row]


def two_at_once(bench: Bench, rounds: int) -> list[Row]:
    """A second process on the same folder is refused, the first ends as if alone."""
    row = Row("-", "two processes on one folder: the second refused (run-in-use), the first equal")
    for _ in range(rounds):
        run = bench.fresh()
        first = bench.start(run)
        while not (bench.root / run / "run.json").exists() and first.poll() is None:
            time.sleep(0.002)
        first.log = first.log.rename(bench.root / "first.log")
        code, said = bench.train(run)
        ended = first.wait()
        wrong = [] if code == 5 and "run-in-use" in said else [f"the second: exit {code}"]
        wrong += bench.unlike(run) if ended == 0 else [f"the first: exit {ended}"]
        row.count(not wrong, ", ".join(wrong))
    return [row]


CASES: dict[str, Callable[[Bench, int], list[Row]]] = {
    "kills": kills, "resumes": resumes, "all-weights": resumes, "signals": signals, "twice": twice,
    "corruptions": corruptions, "not-finite": not_finite,
    "memory": memory, "full-disk": full_disk, "two-at-once": two_at_once,
}  # fmt: skip
SHORT = {"kills": 6, "resumes": 2, "all-weights": 2, "signals": 1, "twice": 1, "corruptions": 3, "not-finite": 1,
         "memory": 1, "full-disk": 1, "two-at-once": 1, "predictions": 4}  # fmt: skip
LONG = {"kills": 100, "resumes": 10, "all-weights": 10, "signals": 3, "twice": 5, "corruptions": 50, "not-finite": 5,
        "memory": 3, "full-disk": 5, "two-at-once": 5, "predictions": 40}  # fmt: skip
