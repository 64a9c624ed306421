"""What a result tells of itself beside its numbers: the commit, the versions, and how its steps spread."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def provenance(*packages: str) -> dict[str, str]:
    """The columns ``commit`` and ``versions`` (Python's, then those of the packages)."""
    told = [f"python {platform.python_version()}", *(f"{name} {_version(name)}" for name in packages)]
    return {"commit": commit(), "versions": " ".join(told)}


def commit(root: Path = ROOT) -> str:
    """The short name of the commit, with ``-dirty`` where tracked files differ from it; empty outside a checkout."""
    if not (root / ".git").exists():  # else git would tell the commit of whatever tree this one lies in
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """The columns ``ms_p50`` and ``ms_p90`` (the nearest rank above) of the steps that were timed, at least one."""
    ordered = sorted(milliseconds)
    return {
        "ms_p50": round(statistics.median(ordered), 1),
        "ms_p90": round(ordered[int(0.9 * len(ordered))], 1),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
