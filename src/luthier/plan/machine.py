"""What this machine has: cores, memory (also a container's limit), GPUs. Read without torch, in well under a second."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from luthier.types import Gpu, Machine

CGROUP = Path("/sys/fs/cgroup")
MIB = 2**20
QUERY = "name,memory.total,memory.free,compute_cap,uuid,mig.mode.current"
Named = tuple[str, Gpu]  # with its UUID


def probe(device: str = "auto") -> Machine:
    """This machine as a run may use it; without its GPUs where ``device`` (of `execution.device`) is cpu."""
    import psutil

    memory = psutil.virtual_memory()
    limit, used = _cgroup_memory(CGROUP)
    total = min(memory.total, limit) if limit else memory.total
    free = min(memory.available, limit - used) if limit else memory.available
    name, flags = _cpu()
    return Machine(
        cores=_cores(),
        memory=total,
        free_memory=max(free, 0),
        gpus=() if device == "cpu" else tuple(map(for_process, range(99), _nvidia())) or _mps(total, free),
        cpu=name,
        cpu_bf16=bool({"avx512_bf16", "amx_bf16", "bf16"} & flags),
        system=f"{platform.system()} {platform.machine()}",
    )


def _cores() -> int:
    """Cores that this process may use: its affinity, and the container's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(CGROUP / "cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def _cgroup_memory(root: Path) -> tuple[int, int]:
    """A container's memory limit and what it uses of it, without the page cache; 0, 0 where there is no limit."""
    for limit_file, used_file, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _read(root / limit_file).strip(), _read(root / used_file).strip()
        if not limit.isdigit() or not used.isdigit() or int(limit) > 2**60:
            continue
        lines = [line.split() for line in _read((root / limit_file).with_name("memory.stat")).splitlines()]
        cached = next((int(line[1]) for line in lines if line[:1] == [cache_key]), 0)
        return int(limit), max(int(used) - cached, 0)
    return 0, 0


def _cpu() -> tuple[str, set[str]]:
    """The processor's name and its instruction set flags (Linux; elsewhere the name alone)."""
    name, flags = platform.processor(), set[str]()
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key in ("flags", "Features"):
            flags = set(value.split())
            break
    return name, flags


def _nvidia() -> tuple[Gpu, ...]:
    """NVIDIA GPUs through nvidia-smi, those that CUDA_VISIBLE_DEVICES leaves."""
    tool, named = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if tool is None or named == "":
        return ()

    def told(*options: str) -> str:
        return subprocess.run([tool, *options], capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        gpus, divided = parse_gpus(told(f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"))
        slices = parse_slices(told("-L"), told("-q", "-x"), dict(gpus)) if divided else {}
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError, ValueError):
        return ()  # a driver that does not answer is no GPU; `luthier doctor` tells of it
    return visible(gpus, slices, named)


def visible(gpus: Sequence[Named], slices: Mapping[str, Sequence[Named]], named: str | None) -> tuple[Gpu, ...]:
    """The devices of a process with this CUDA_VISIBLE_DEVICES, in its order, as CUDA counts them.

    An entry is a number, or the beginning of one device's UUID; the first that names none ends the list, and one that
    comes twice leaves none. Of a GPU that is divided (MIG; ``slices``: UUID of the GPU -> its slices) a process gets
    the slice that it names, the first where it names the GPU, and never the whole.
    """
    whole = [(uuid, slices[uuid][0][1] if uuid in slices else gpu) for uuid, gpu in gpus if slices.get(uuid, True)]
    if named is None:
        return tuple(gpu for _, gpu in whole)
    known = [*whole, *(one for each in slices.values() for one in each)]
    chosen: list[Named] = []
    for entry in map(str.strip, named.split(",")):
        found = whole[int(entry) :][:1] if entry.isdigit() else [one for one in known if one[0].startswith(entry)]
        if not entry or len(found) != 1:
            break
        if found[0] in chosen:
            return ()
        chosen += found
    return tuple(gpu for _, gpu in chosen)


def parse_gpus(text: str) -> tuple[list[Named], bool]:
    """GPUs from nvidia-smi's comma-separated lines of `QUERY`, and whether one is divided; memory there is in MiB."""
    gpus, divided = list[Named](), False
    for line in text.strip().splitlines():
        parts = [part.strip() for part in line.rsplit(",", 5)]
        if len(parts) != 6 or not parts[1].isdigit() or not (parts[2].isdigit() or parts[5] == "Enabled"):
            continue
        name, total, free, version, uuid, mode = parts
        major, _, minor = version.partition(".")
        capability = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
        gpus.append((uuid, Gpu(name, int(total) * MIB, int(free) * MIB if free.isdigit() else 0, capability)))
        divided |= mode == "Enabled"
    return gpus, divided


def parse_slices(listed: str, detailed: str, gpus: Mapping[str, Gpu]) -> dict[str, list[Named]]:
    """The slices of each divided GPU of ``gpus``: their UUIDs from `nvidia-smi -L`, their memory from `-q -x`.

    Both number the slices of a GPU from 0. Raises ParseError for what is no XML, ValueError for memory in other units.
    """
    out: dict[str, list[Named]] = {}
    for one in ElementTree.fromstring(detailed).iter("gpu"):
        uuid = one.findtext("uuid", "")
        if uuid not in gpus or one.findtext("mig_mode/current_mig", "").strip() != "Enabled":
            continue
        memory = {
            part.findtext("index", "").strip(): [
                MIB * int(part.findtext(f"fb_memory_usage/{what}", "").removesuffix("MiB"))
                for what in ("total", "free")
            ]
            for part in one.iter("mig_device")
        }
        _, _, own = listed.partition(f"(UUID: {uuid})")
        own = own.partition("\nGPU ")[0]
        out[uuid] = [
            (named, replace(gpus[uuid], name=f"{gpus[uuid].name} MIG {kind}", memory=total, free=free))
            for kind, index, named in re.findall(r"MIG (\S+)\s+Device\s+(\d+): \(UUID: ([^)]+)\)", own)
            if index in memory
            for total, free in [memory[index]]
        ]
    return out


def for_process(index: int, gpu: Gpu) -> Gpu:
    """The GPU as this process may use it, where torch is at work on it already.

    What torch keeps for reuse is free to this process; and a process may have capped itself
    (`torch.cuda.set_per_process_memory_fraction`), of which no driver tells.
    """
    torch = sys.modules.get("torch")  # a process without torch has done neither, and shall not load it for this
    if torch is None or not torch.cuda.is_initialized() or index >= torch.cuda.device_count():
        return gpu
    used, kept = torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index)
    most = int(torch.cuda.get_per_process_memory_fraction(index) * gpu.memory)
    return replace(gpu, free=max(0, min(gpu.free + kept - used, most - used)))


def _mps(total: int, free: int) -> tuple[Gpu, ...]:
    """Apple's GPU, which shares the machine's memory."""
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        return ()
    return (Gpu("Apple GPU", total, free, None, "mps"),)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # not Linux, or not in a container: nothing is known there
