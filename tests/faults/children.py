"""`luthier train` in processes of their own, with a fault put into them; forked from one that has imported everything.

The program that is run is the installed command's `main`, with its arguments, signals and exit codes. Faults are put
around Luthier's own functions in the child alone, so the shipped program carries no switch for them.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Fault = Callable[[], None]


@dataclass
class Child:
    """A running or ended process and where its output goes."""

    pid: int
    log: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, timeout: float = 120.0) -> int:
        """Wait for the end; one that hangs is killed, and said."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"a child hung for {timeout} s: {self.output()[-2000:]}")
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def kill(self) -> int:
        """SIGKILL, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert self.code is not None
        return self.code

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def warm() -> None:
    """Import what a training process imports, without computing anything."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import luthier.cli
    import luthier.infer.engine
    import luthier.pipeline.decoded
    import luthier.pipeline.generic
    import luthier.train.loop  # noqa: F401

    torch.set_num_threads(1)


def start(work: Path, *arguments: str, command: str = "train", fault: Fault | None = None) -> Child:
    """Run ``luthier COMMAND`` with these arguments in ``work``."""
    log = work / "child.log"
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Child(pid, log)
    code = 98
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(handle, number)
        os.chdir(work)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["luthier", command, *arguments]
        _note_samples(work)
        if fault is not None:
            fault()
        from luthier import cli

        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            import traceback

            code = 99
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _note_samples(work: Path) -> None:
    """Append the rows of every step, with the place in the order, to samples.jsonl."""
    from luthier.data.source import TableSource

    take = TableSource.next_step

    def noting(self: Any) -> Any:
        at = self.state()
        rows = take(self)
        with (work / "samples.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps([at["epoch"], at["step"], [row.row for row in rows]]) + "\n")
        return rows

    TableSource.next_step = noting  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------------------- faults


def around(owner: Any, name: str, before: Callable[..., Any]) -> None:
    """Call ``before`` with the arguments of each call of ``owner.name``, then the function itself."""
    inner = getattr(owner, name)

    def outer(*args: Any, **named: Any) -> Any:
        before(*args, **named)
        return inner(*args, **named)

    setattr(owner, name, outer)


def note_copies() -> None:
    """Append the step of every checkpoint to `copies` when its copy is taken, in the thread that trains."""
    from luthier.train import checkpoint

    def note(step: int, *_: Any, **__: Any) -> None:
        with Path("copies").open("a", encoding="utf-8") as out:
            out.write(f"{step}\n")

    around(checkpoint, "snapshot", note)


def exit_in_step(step: int) -> Fault:
    """End without a word in the middle of a step (from 1)."""

    def put() -> None:
        from luthier.train import step as steps

        around(steps, "_clip", lambda setup, optimizer: os._exit(77) if _at(setup) == step else None)
        _count_steps()

    return put


def exit_when_merging() -> Fault:
    """End without a word once the last step is taken and the adapter saved."""

    def put() -> None:
        from luthier.pipeline import training

        around(training, "merge", lambda *_: os._exit(77))

    return put


_STEP = [0]


def _count_steps() -> None:
    from luthier.train import loop

    def note(setup: Any, now: Any, rate: float) -> None:
        _STEP[0] = now.step + 1

    around(loop, "train_step", note)


def _at(setup: Any) -> int:
    return _STEP[0]


SLOW = 0.05  # seconds that each piece of a slow evaluation takes more


def signal_in(phase: str, number: int, step: int) -> Fault:
    """Send this process a signal when it is in a phase; those of training in or after ``step``.

    An evaluation and a generation are made to take many seconds, and the signal comes into their middle.
    """

    def put() -> None:
        from luthier.pipeline import fitting, training
        from luthier.train import checkpoint, evaluation
        from luthier.train import step as steps

        sent: list[int] = []

        def send(*_: Any, **__: Any) -> None:
            if not sent and (phase in ("load", "prepare") or _STEP[0] >= step):
                sent.append(1)
                Path("signalled").write_text(f"{_STEP[0]} {time.time()}")
                os.kill(os.getpid(), number)
                time.sleep(0.02)  # a writer thread is not interrupted; the main thread is

        def slowly(*_: Any, **__: Any) -> None:
            if _STEP[0] >= step:
                _slow_down()
                timer = threading.Timer(3 * SLOW, send)
                timer.daemon = True
                timer.start()

        _count_steps()
        places: dict[str, tuple[Any, str, Callable[..., Any]]] = {
            "prepare": (training, "prepare", send),
            "load": (fitting, "open_for_tuning", send),
            "step": (steps, "_clip", send),
            "evaluation": (evaluation.Evaluator, "_run", slowly),
            "generation": (fitting, "_generated_scores", slowly),
            "save": (checkpoint.manifest, "write", send),
            "adapter": (fitting, "growing", send),
        }
        around(*places[phase])
        if phase == "evaluation":
            inner = evaluation.Evaluator._run

            def often(self: Any, passes: Any, plan: Any) -> Any:
                alone = [[example] for examples in passes for example in examples]
                return inner(self, alone * 40 if _STEP[0] >= step else passes, plan)

            evaluation.Evaluator._run = often

    return put


def signal_twice(number: int, step: int) -> Fault:
    """Two signals in a step that would go on for a long time."""

    def put() -> None:
        from luthier.train import step as steps

        def send(*_: Any, **__: Any) -> None:
            if _STEP[0] == step:
                os.kill(os.getpid(), number)
                time.sleep(3 * SLOW)
                Path("signalled").write_text(str(time.time()))
                os.kill(os.getpid(), number)
                time.sleep(60)

        _count_steps()
        around(steps, "_clip", send)

    return put


def _slow_down() -> None:
    """From now on every pass of an evaluation and every step of a generation takes a while longer."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    from luthier.infer.session import Session
    from luthier.train import evaluation

    def wait(*_: Any, **__: Any) -> None:
        time.sleep(SLOW)

    around(evaluation, "collate", wait)
    around(Session, "round", wait)
    register_module_forward_pre_hook(wait)


def spoil(where: str, step: int) -> Fault:
    """NaN in the loss, a gradient or a weight of a step."""

    def put() -> None:
        import torch

        from luthier.train import step as steps

        _count_steps()

        def gradient(setup: Any, optimizer: Any) -> None:
            if _STEP[0] == step:
                optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = math.nan

        def weight(setup: Any, now: Any, *_: Any) -> None:
            if _STEP[0] == step:
                with torch.no_grad():
                    now.optimizer.param_groups[0]["params"][0].view(-1)[0] = math.nan

        if where == "loss":
            inner = steps.collate

            def collate(*given: Any, **named: Any) -> Any:
                batch = inner(*given, **named)
                if _STEP[0] == step:
                    batch.target_weight[batch.target_weight != 0] = math.nan
                return batch

            steps.collate = collate  # type: ignore[assignment]
        else:
            around(steps, *{"gradient": ("_clip", gradient), "weights": ("passes_that_fit", weight)}[where])

    return put


def out_of_memory(step: int) -> Fault:
    """Passes of more than one row do not fit from this step on."""

    def put() -> None:
        import torch

        from luthier.train import step as steps

        _count_steps()

        def collate(examples: Any, *_: Any, **__: Any) -> None:
            if _STEP[0] >= step and len(examples) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory (it is not: this is a test)")

        around(steps, "collate", collate)

    return put


def small_files(limit: int) -> Fault:
    """No file may be larger than ``limit`` bytes: a write fails in its middle, as on a full disk."""

    def put() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from luthier.train import keeping

        def limited(*_: Any, **__: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        around(keeping.checkpoint, "save", limited)

    return put


def faulty_mirror(seed: int) -> Fault:
    """The mirror's drive tears and loses every tenth write."""

    def put() -> None:
        from luthier.run import mirror

        sys.path.insert(0, str(Path(__file__).parents[1]))
        from faulty_drive import Faulty

        mirror._open = lambda url: (Faulty(0.1, seed), url)  # type: ignore[assignment]

    return put


def lost_mirror(drive: Path, step: int) -> Fault:
    """From a step on the mirror's folder is a file, in which nothing can be written."""

    def put() -> None:
        import shutil

        from luthier.train import step as steps

        def lose(*_: Any, **__: Any) -> None:
            if _STEP[0] == step:
                while not drive.is_file():
                    shutil.rmtree(drive, ignore_errors=True)
                    try:
                        drive.touch(exist_ok=False)
                    except FileExistsError:
                        continue

        _count_steps()
        around(steps, "_clip", lose)

    return put


def fill_disk(filler: Path, leave: int) -> Fault:
    """Somebody fills the disk of ``filler`` until ``leave`` bytes are left, just before a save."""

    def put() -> None:
        import shutil

        from luthier.train import keeping

        def fill(*_: Any, **__: Any) -> None:
            free = shutil.disk_usage(filler.parent).free
            if free > leave:
                with filler.open("ab") as out:
                    out.write(bytes(free - leave))

        around(keeping.checkpoint, "save", fill)

    return put


def no_host_memory(phase: str, step: int) -> Fault:
    """In this phase the address space may hardly grow (RLIMIT_AS), and something large is asked for."""

    def put() -> None:
        import psutil
        import torch

        from luthier.pipeline import fitting
        from luthier.train import evaluation
        from luthier.train import step as steps

        def ask(*_: Any, **__: Any) -> None:
            if phase == "load" or _STEP[0] >= step:
                limit = psutil.Process().memory_info().vms + (256 << 20)
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
                torch.empty(1 << 30, dtype=torch.uint8)

        _count_steps()
        places = {"load": (fitting, "open_for_tuning"), "step": (steps, "collate")}
        around(*places.get(phase, (evaluation, "collate")), ask)

    return put
