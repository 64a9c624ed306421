"""Untrusted templates in a process of their own: bounded memory, a deadline, killed when overdue.

A chat template from a model's files or a config is somebody else's program, and Jinja's sandbox bounds what it may
touch, not how long it takes. So it is compiled and run in a small child process that is kept between calls and renders
many conversations in one call. The two speak JSON over pipes, so that nothing a template makes is ever executed here.
The child gets no environment beyond what starting Python takes, and can neither write files nor grow beyond `MEMORY`.
Its deadline counts processor time, so that a loaded machine refuses no honest template; a wall stands far behind it.

    child ──▶ an empty line, once it has started: that is not the template's, and no deadline counts it
    parent ──▶ 8 bytes length, {"template", "variables", "jobs"}        child ──▶ one line of JSON a job, as it is done
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from luthier import json_reader, numbers
from luthier.errors import DataError, Fault

MEMORY = 1 << 30  # bytes of address space of the child, where the platform can limit it
PATIENCE = 1.0  # seconds of processor time for one text
PATIENCE_EACH = 0.05  # what a call has on top of it for each of its texts
LOADED = 10  # times as long may pass by the clock, which alone counts where no process can be told its time (Windows)
STARTING = 120.0  # seconds for the child to start, which a loaded machine may take many of
LONGEST_REPLY = 64 << 20  # bytes of one reply
KEPT = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "HOME", "LANG")
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from luthier.assets import template_worker; template_worker.serve()"
)


@dataclass(frozen=True, slots=True)
class Job:
    """One conversation, written as often as ``cuts`` says: (how many of its turns, with the opening of an answer)."""

    messages: Sequence[Mapping[str, Any]]
    cuts: Sequence[tuple[int, bool]]
    tools: Sequence[Mapping[str, Any]] | None = None
    where: str = ""  # for messages


class TemplateWorker:
    """The child process, started at the first call and again after it had to be killed. One call at a time."""

    def __init__(self, memory: int = MEMORY, patience: float = PATIENCE) -> None:
        """``memory``: bytes of address space; ``patience``: seconds of processor time for one text."""
        self._memory, self._patience = memory, patience
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def render(self, template: str, jobs: Sequence[Job], variables: Mapping[str, Any]) -> list[list[str]]:
        """The texts of each job, one for each of its cuts; ``variables`` reach the template as they are.

        Raises:
            DataError: ``data-chat`` with the job's place when the template refuses a conversation or exceeds its
                bounds of time, memory or output; ``data-template`` when it cannot be compiled.
        """
        asked = [{"messages": list(j.messages), "tools": j.tools, "cuts": list(j.cuts)} for j in jobs]
        out: list[list[str]] = []
        request = {"template": template, "variables": dict(variables), "jobs": asked}
        replies = self._call(request, len(jobs), sum(len(job.cuts) for job in jobs))
        for job, reply in zip(jobs, replies, strict=False):  # a fault is the last reply, and is raised
            out.append(_texts(reply, job.where))
        return out

    def check(self, template: str, where: str) -> None:
        """Compile ``template``. Raises DataError ``data-template``, or ``data-chat`` when even that exceeds bounds."""
        for reply in self._call({"template": template, "check": where}, 1, 1):
            _texts(reply, where)

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # what was not yet written went with the child
        process.wait()

    def _call(self, request: Mapping[str, Any], count: int, texts: int) -> list[Any]:
        """One reply a job, or fewer, and then the last is the fault of its job: raised, killed, or died in."""
        together = self._patience + PATIENCE_EACH * texts
        request = {**request, "patience": [self._patience, together]}
        body = numbers.dumps(request, separators=(",", ":")).encode("utf-8", "surrogatepass")
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            overdue = threading.Event()
            timer = threading.Timer(LOADED * together, _kill, (process, overdue))
            timer.daemon = True
            timer.start()
            replies: list[Any] = []
            try:
                process.stdin.write(len(body).to_bytes(8, "little") + body)
                process.stdin.flush()
                for line in _lines(process.stdout, count):
                    replies.append(json_reader.parse(line))
                    if isinstance(replies[-1], dict):  # a fault: the child stops at the first
                        break
            except (OSError, ValueError):
                pass  # the pipe broke or a line is not whole: the child is gone, which is told below
            finally:
                timer.cancel()
            if len(replies) < count and not (replies and isinstance(replies[-1], dict)):
                self.close()
                ran_out = overdue.is_set() or (OVERDUE != 0 and process.returncode == -OVERDUE)
                replies.append(asdict(_died(ran_out, self._patience, self._memory)))
        return replies

    def _started(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # a fork: the child it knows of is its parent's
            self._process, self._owner = None, os.getpid()
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", START, json.dumps(sys.path), str(self._memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in KEPT if name in os.environ},
        )
        assert self._process.stdout is not None
        timer = threading.Timer(STARTING, self._process.kill)
        timer.daemon = True
        timer.start()
        self._process.stdout.readline(2)  # where it did not start, the request that follows finds the pipe broken
        timer.cancel()
        return self._process


OVERDUE = getattr(signal, "SIGPROF", 0)  # ends a child that has used up its processor time; 0 where there is none


def _kill(process: subprocess.Popen[bytes], overdue: threading.Event) -> None:
    overdue.set()
    process.kill()


def _lines(stream: Any, count: int) -> Iterator[bytes]:
    for _ in range(count):
        line = stream.readline(LONGEST_REPLY)
        if not line.endswith(b"\n"):
            return
        yield line


def _died(overdue: bool, patience: float, memory: int) -> Fault:
    slow = f"it took longer than {patience:g} s, or than {PATIENCE_EACH:g} s for each of many texts"
    why = slow if overdue else f"its process ended (it may use {memory >> 20} MiB)"
    return Fault(
        "data-chat",
        f"the chat template exceeds its bounds: {why}",
        received=why,
        allowed=f"a template that writes its conversations within {patience:g} s and {memory >> 20} MiB",
        fix="set prompt.chat_template to a template without unbounded loops or recursion",
    )


def _texts(reply: Any, where: str) -> list[str]:
    if isinstance(reply, dict):
        fault = Fault(**reply)
        raise DataError([Fault(**{**asdict(fault), "where": fault.where or where or None})])
    return [str(text) for text in reply]


# ------------------------------------------------------------------------------------------------ the one of a process

_SHARED = TemplateWorker()
atexit.register(_SHARED.close)


def shared() -> TemplateWorker:
    """The worker that everything in this process uses."""
    return _SHARED


# ----------------------------------------------------------------------------------------------------------- the child


def serve() -> None:
    """Answer requests on standard input until it ends. Runs in the child."""
    import luthier.assets.chat  # what answering needs is there before the deadline of a request begins
    import luthier.assets.sandbox  # noqa: F401

    limit(int(sys.argv[2]))
    if OVERDUE:
        signal.signal(OVERDUE, signal.SIG_DFL)  # no handler of ours: it has to end an endless loop in C, too
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    outgoing.write(b"\n")
    outgoing.flush()
    while head := incoming.read(8):
        request = numbers.loads(str(incoming.read(int.from_bytes(head, "little")), "utf-8", "surrogatepass"))
        for reply in _answers(request):
            outgoing.write(json.dumps(reply, separators=(",", ":")).encode() + b"\n")
            outgoing.flush()


class _Deadline:
    """The kernel ends this process when a text, or all of them together, has taken its seconds of processor time."""

    def __init__(self, each: float, together: float) -> None:
        self._each, self._end = each, time.process_time() + together

    def __enter__(self) -> None:
        self._arm(max(min(self._each, self._end - time.process_time()), 1e-3))  # 0 would disarm it

    def __exit__(self, *_: object) -> None:
        self._arm(0)

    def _arm(self, seconds: float) -> None:
        if OVERDUE:
            signal.setitimer(signal.ITIMER_PROF, seconds)


def _answers(request: Mapping[str, Any]) -> Iterator[Any]:
    from luthier.assets.chat import check_template

    deadline = _Deadline(*request["patience"])
    try:
        if "check" in request:
            with deadline:
                check_template(request["template"], request["check"])
            yield []
            return
        for job in request["jobs"]:
            yield [_text(request, job, cut, deadline) for cut in job["cuts"]]
    except DataError as error:
        yield _plain(error.faults[0])
    except MemoryError:
        yield _plain(_died(False, PATIENCE, int(sys.argv[2])))


def _text(request: Mapping[str, Any], job: Mapping[str, Any], cut: tuple[int, bool], deadline: _Deadline) -> str:
    from luthier.assets.chat import render_chat

    with deadline:
        return render_chat(
            request["template"],
            job["messages"][: cut[0]],
            tools=job["tools"],
            add_generation_prompt=cut[1],
            copied=True,
            **request["variables"],
        )


def _plain(fault: Fault) -> dict[str, Any]:
    return {**asdict(fault), "received": None if fault.received is None else str(fault.received)[:200]}


def limit(memory: int) -> None:
    """Bound this process, a child; a platform without limits (Windows) has the deadline alone."""
    try:
        import resource
    except ImportError:
        return
    wanted = {"RLIMIT_AS": memory, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
    for name, most in wanted.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, hard if sys.platform == "darwin" else most))
        except (ValueError, OSError):
            continue  # a limit that this platform does not take
