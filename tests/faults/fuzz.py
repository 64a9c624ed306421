"""Changed files for every parser, each batch in a process of its own: crashes, hangs and other errors are faults.

The changes are drawn from a seed: bits, bytes, runs copied, removed and repeated, other files' parts, words of the
format. `atheris`, where it is installed, is guided by what the changes reach (`fuzz.py TARGET --guided`).
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import parsers

if TYPE_CHECKING:
    from cases import Row

HANG = 10  # seconds for one file
HUNG = "hung"
MEMORY = 6 << 30  # bytes of address space of a child beyond what it has at first
COUNT = {False: 60, True: 5000}  # files of each parser, short and long
BATCH = 500  # files of one process


def fuzz(name: str, count: int, seed: int) -> list[str]:
    """Try ``count`` changed files on a parser; a line for each fault."""
    target, wrong = parsers.TARGETS[name], []
    seeds = target.seeds()
    for first in range(0, count, BATCH):
        at = first
        while at < min(count, first + BATCH):
            with tempfile.TemporaryDirectory(prefix="luthier-fuzz-") as folder:
                done, said = _child(name, seeds, range(at, min(count, first + BATCH)), seed, Path(folder))
            if said.startswith(HUNG) and not _hangs_alone(name, done, seed):
                said = ""
            if said:
                wrong.append(f"{name} {done} of seed {seed}: {said}")
            at = done + 1
    return wrong


def _hangs_alone(name: str, number: int, seed: int) -> bool:
    """Whether a file hangs in a process that is its own from the start.

    A fork of a process with threads may wait for a lock that one of them held: that is no fault of the parser.
    """
    command = [sys.executable, __file__, name, "--seed", str(seed), "--alone", str(number)]
    return subprocess.run(command, capture_output=True).returncode == -signal.SIGALRM


def row(name: str, long: bool) -> Row:
    """A line of the table: how many files a parser read or refused."""
    from cases import Row  # imports luthier, and what is there before atheris comes is not followed by it

    target = parsers.TARGETS[name]
    number = {"parquet": "36", "excel": "36", "csv": "35", "jsonl": "35", "yaml": "34"}.get(name, "37")
    out = Row(number, f"changed files for the parser of {name}: read or refused, no crash, no hang")
    out.asked = COUNT[long] if target.cheap else COUNT[long] // 5
    out.wrong = fuzz(name, out.asked, 1)
    out.held = out.asked - len(out.wrong)
    return out


def changed(seeds: list[bytes], words: tuple[bytes, ...], draw: random.Random) -> bytes:
    """One of the seeds after a few changes."""
    content = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at = draw.randrange(len(content) + 1)
        size = draw.choice((1, 2, 4, 8, 32, 256))
        match draw.randrange(8):
            case 0 if at < len(content):
                content[at] ^= 1 << draw.randrange(8)
            case 1:
                content[at : at + size] = draw.randbytes(len(content[at : at + size]))
            case 2:
                del content[at : at + size]
            case 3:
                content[at:at] = content[at : at + size] * draw.choice((1, 2, 100))
            case 4:
                other = draw.choice(seeds)
                begin = draw.randrange(len(other))
                content[at : at + size] = other[begin : begin + size]
            case 5 if words:
                word = draw.choice(words)
                content[at : at + draw.choice((0, len(word)))] = word
            case 6:
                del content[at:]
            case _:
                content[at : at + size] = draw.choice((b"\0", b"\xff", b" ", b"9")) * size
    return bytes(content)


def _child(name: str, seeds: list[bytes], numbers: range, seed: int, folder: Path) -> tuple[int, str]:
    """Run some numbers in a child; the number it ended at, and what was wrong there ("" for nothing)."""
    note, log = folder / "at", folder / "log"
    pid = os.fork()
    if not pid:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = 98
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
            code = _try(name, seeds, numbers, seed, folder, note)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    done = int(note.read_text()) if note.exists() else numbers[0]
    if code == 0:
        return numbers[-1], ""
    text = log.read_text(errors="replace").strip()[-600:]
    return done, {-signal.SIGALRM: f"{HUNG} for {HANG} s"}.get(code, f"exit {code}: {text}")


def _try(name: str, seeds: list[bytes], numbers: range, seed: int, folder: Path, note: Path) -> int:
    import traceback

    target = parsers.TARGETS[name]
    for number in numbers:
        note.write_text(str(number))
        place = folder / "place"
        place.mkdir()
        (place / target.name).write_bytes(changed(seeds, target.words, random.Random(f"{name} {seed} {number}")))
        signal.alarm(HANG)  # its default effect ends the child, wherever it is
        try:
            target.run(place / target.name)
        except BaseException:
            traceback.print_exc()
            return 1
        signal.alarm(0)
        shutil.rmtree(place)
    return 0


def guided(name: str, seconds: int) -> int:
    """Let atheris look for a fault for so long. It ends the process itself."""
    import atheris

    target, folder = parsers.TARGETS[name], Path(tempfile.mkdtemp(prefix="luthier-atheris-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, one in enumerate(target.seeds()):
        (corpus / str(number)).write_bytes(one)
    with atheris.instrument_imports(include=["luthier"]):
        target.run(corpus / "0")  # imports what the parser takes

    def one_input(content: bytes) -> None:
        path = folder / target.name
        path.write_bytes(content)
        target.run(path)
        shutil.rmtree(folder / "cache", ignore_errors=True)

    limits = [f"-max_total_time={seconds}", f"-timeout={HANG}", "-rss_limit_mb=8000"]
    atheris.Setup(["fuzz", *limits, str(corpus)], one_input)
    atheris.Fuzz()
    return 0


def main() -> int:
    """Fuzz the targets named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[*parsers.TARGETS, []])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guided", type=int, metavar="SECONDS", help="by atheris; one target")
    parser.add_argument("--alone", type=int, metavar="NUMBER", help="this file, in this process; one target")
    asked = parser.parse_args()
    if asked.alone is not None:
        with tempfile.TemporaryDirectory(prefix="luthier-fuzz-") as folder:
            name, only = asked.only[0], range(asked.alone, asked.alone + 1)
            return _try(name, parsers.TARGETS[name].seeds(), only, asked.seed, Path(folder), Path(folder) / "at")
    if asked.guided:
        return guided(asked.only[0], asked.guided)
    found = []
    for name in asked.only or parsers.TARGETS:
        began = time.monotonic()
        wrong = fuzz(name, asked.count, asked.seed)
        print(f"{name}: {asked.count} files, {len(wrong)} faults, {time.monotonic() - began:.0f} s", flush=True)
        found += wrong
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
