"""Run tests and keep what came out, with the commit and the versions that they ran on.

    python scripts/record_tests.py tests/results/long.json -m "long and not gpu"

Everything after the file is pytest's. Up to a hundred tests are listed one by one, with what they printed; more of
them by file.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "numpy", "numba", "pandas", "pyarrow", "triton",
)  # fmt: skip
LISTED = 100


class Results:
    """A pytest plugin that keeps the outcome, seconds and words of each test."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Set-up, call and clean-up of one test: their seconds add up; the first that does not pass decides."""
        one = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        one["seconds"] += report.duration
        if report.outcome != "passed" and one["outcome"] == "passed":
            one["outcome"] = report.outcome
            one["why"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)[-1000:]
        if report.when == "call" and report.passed and report.capstdout.strip():
            one["printed"] = report.capstdout.strip()[-500:]

    def listed(self) -> list[dict[str, Any]]:
        """Each test, or each file where there are many tests."""
        if len(self.tests) <= LISTED:
            return [{"test": name, **one, "seconds": round(one["seconds"], 1)} for name, one in self.tests.items()]
        files: dict[str, dict[str, Any]] = {}
        for name, one in self.tests.items():
            file = files.setdefault(name.partition("::")[0], {"seconds": 0.0, "outcomes": Counter(), "not passed": []})
            file["seconds"] = round(file["seconds"] + one["seconds"], 1)
            file["outcomes"][one["outcome"]] += 1
            if one["outcome"] != "passed":
                file["not passed"].append({"test": name, "outcome": one["outcome"], "why": one["why"]})
        return [{"file": name, **file} for name, file in files.items()]


def machine() -> str:
    """This machine in words: cores, memory, system, and its GPU where it has one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    words = [f"{os.cpu_count()} CPU cores", f"{memory:.0f} GiB", f"{platform.system()} {platform.machine()}"]
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        words += subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        words.append("no GPU")
    return ", ".join(words)


def commit() -> str:
    """The commit that is checked out, marked when tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!tests/results")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


def main() -> int:
    """Run pytest, write the file, and return pytest's exit code."""
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".json"):
        print(__doc__, file=sys.stderr)
        return 2
    path, arguments = Path(sys.argv[1]).resolve(), sys.argv[2:]
    began, results, on = datetime.datetime.now(datetime.UTC), Results(), commit()
    code = int(pytest.main(["--rootdir", str(ROOT), *arguments], plugins=[results]))
    seconds = (datetime.datetime.now(datetime.UTC) - began).total_seconds()
    found = {
        "command": ["pytest", *arguments],
        "commit": on,
        "began": began.isoformat(timespec="seconds"),
        "seconds": round(seconds),
        "machine": machine(),
        "threads": os.environ.get("OMP_NUM_THREADS", "not limited"),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
        "exit_code": code,
        "outcomes": dict(Counter(one["outcome"] for one in results.tests.values())),
        "tests": results.listed(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return code


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
