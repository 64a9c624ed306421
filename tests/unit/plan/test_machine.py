"""The machine as it is read, and the table of GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from luthier.errors import ConfigError
from luthier.plan import probe
from luthier.plan.cards import CARDS, UNKNOWN, card_named, card_of, imagined
from luthier.plan.machine import _cgroup_memory, for_process, parse_gpus, visible
from luthier.types import Gpu

MIB = 2**20


SMI = """#!{python}
import sys
if "-L" in sys.argv:
    print('''GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aa11)
  MIG 3g.20gb     Device  0: (UUID: MIG-5511)
  MIG 1g.5gb      Device  1: (UUID: MIG-5522)
GPU 1: Tesla T4 (UUID: GPU-ab22)''')
elif "-q" in sys.argv:
    part = ("<mig_device><index>%s</index><fb_memory_usage><total>%s MiB</total><free>%s MiB</free></fb_memory_usage>"
            "</mig_device>")
    parts = part % (0, 20096, 20000) + part % (1, 4864, 4800)
    print("<log><gpu><mig_mode><current_mig>Enabled</current_mig></mig_mode><mig_devices>" + parts
          + "</mig_devices><uuid>GPU-aa11</uuid></gpu><gpu><mig_mode><current_mig>N/A</current_mig></mig_mode>"
          + "<mig_devices>None</mig_devices><uuid>GPU-ab22</uuid></gpu></log>")
else:
    print("NVIDIA A100-SXM4-40GB, 40960, 40000, 8.0, GPU-aa11, " + "{mode}")
    print("Tesla T4, 15360, 15000, 7.5, GPU-ab22, [N/A]")
"""


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str, named: str | None) -> list[str]:
    """The GPUs of a machine with this tool, by name."""
    tool = folder / "nvidia-smi"
    tool.write_text(SMI.replace("{python}", sys.executable).replace("{mode}", mode))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    return [f"{gpu.name} {gpu.memory // MIB}" for gpu in probe().gpus]


A100, T4 = "NVIDIA A100-SXM4-40GB 40960", "Tesla T4 15360"


@pytest.mark.parametrize(
    ("named", "left"),
    [
        (None, [A100, T4]),
        ("", []),
        ("-1", []),
        ("1, 0", [T4, A100]),
        ("1,7,0", [T4]),  # what comes after one that is none is not seen
        ("GPU-ab22", [T4]),
        ("GPU-ab,GPU-aa", [T4, A100]),  # the beginning is enough
        ("GPU-a", []),  # of both
        ("GPU-ab22,GPU-ff,GPU-aa11", [T4]),
        ("1,1", []),
    ],
)
def test_gpus_are_those_that_cuda_shows_to_this_process(
    named: str | None, left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nvidia_smi(tmp_path, monkeypatch, "Disabled", named) == left


def test_an_empty_entry_is_no_beginning_of_a_name() -> None:
    gpu = Gpu("Tesla T4", 15360 * MIB, 15000 * MIB)
    assert visible([("GPU-ab22", gpu)], {}, "0,") == (gpu,) and visible([("GPU-ab22", gpu)], {}, ",0") == ()


SLICES = ["NVIDIA A100-SXM4-40GB MIG 3g.20gb 20096", "NVIDIA A100-SXM4-40GB MIG 1g.5gb 4864"]


@pytest.mark.parametrize(
    ("named", "left"),
    [(None, [SLICES[0], T4]), ("0", SLICES[:1]), ("MIG-5522", SLICES[1:]), ("MIG-55", []), ("GPU-aa11", SLICES[:1])],
)
def test_of_a_divided_gpu_a_process_has_a_slice(
    named: str | None, left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nvidia_smi(tmp_path, monkeypatch, "Enabled", named) == left


def test_a_plan_and_torch_number_gpus_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi goes by the bus; who has set another order keeps it."""
    code = "import luthier, os, sys; assert 'torch' not in sys.modules; print(os.environ['CUDA_DEVICE_ORDER'])"
    for given, left in ((None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")):
        monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
        if given:
            monkeypatch.setenv("CUDA_DEVICE_ORDER", given)
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == left


def test_gpus_are_read_from_nvidia_smi() -> None:
    rest = "GPU-1, [N/A]"
    lines = (
        f"NVIDIA H100, 81559, 81008, 9.0, {rest}\nTesla T4, 15360, 15000, 7.5, {rest}\nbroken\nX, [N/A], 1, 2, {rest}\n"
    )
    gpus = [gpu for _, gpu in parse_gpus(lines)[0]]
    assert [g.name for g in gpus] == ["NVIDIA H100", "Tesla T4"]
    assert gpus[1].memory == 15360 * MIB and gpus[0].capability == (9, 0)


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert _cgroup_memory(tmp_path) == (0, 0)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 200\n")
    assert _cgroup_memory(tmp_path) == (1000, 400)
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_memory(tmp_path) == (0, 0)


def test_this_machine() -> None:
    machine = probe()
    assert machine.cores >= 1 and 0 < machine.free_memory <= machine.memory


def test_a_card_is_found_by_any_of_its_names() -> None:
    assert card_named("t4").name == "T4" and card_named("4090").name == "RTX 4090"
    assert card_named("a100-80") == card_named("A100") != card_named("A100-40")
    for driver, total, name in (
        ("Tesla T4", 15360, "T4"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100"),
        ("NVIDIA A100-SXM4-40GB", 40960, "A100-40"),
        ("NVIDIA GeForce RTX 4090", 24564, "RTX 4090"),
        ("NVIDIA A10G", 23028, "A10G"),
        ("NVIDIA A100-PCIE-40GB", 40960, "A100-40"),
        ("NVIDIA A100 80GB PCIe", 81920, "A100"),
        ("Tesla V100-PCIE-32GB", 32768, "V100-32"),
        ("NVIDIA H100 80GB HBM3", 81559, "H100"),
        ("NVIDIA H100 PCIe", 81559, "H100-PCIe"),
        ("NVIDIA H200", 143771, "H200"),
        ("NVIDIA Unheard-of", 20000, "unknown GPU"),
    ):
        assert card_of(Gpu(driver, total * MIB, total * MIB)).name == name, driver
        assert name == "unknown GPU" or card_named(driver).name == name, driver
    assert card_of(Gpu("x", MIB, MIB)) is UNKNOWN
    for typed, name in (
        ("A100-80GB", "A100"), ("a100 40gib", "A100-40"), ("V100", "V100"), ("V100 32GB", "V100-32"),
        ("A100-PCIe", "A100"), ("T4 16GB", "T4"), ("H100-SXM5-80GB", "H100"), ("RTX 2080 Ti", "RTX 2080 Ti"),
    ):  # fmt: skip
        assert card_named(typed).name == name, typed


def test_an_unknown_card_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        card_named("T44")
    fault = caught.value.faults[0]
    assert set(fault.allowed) == {card.name for card in CARDS}
    assert fault.fix == "did you mean 'T4'? Or give its memory instead: --memory 16GiB"
    for other in ("GH200", "A100-24GB", ""):  # a card of its own, one that is not made, none
        with pytest.raises(ConfigError) as caught:
            card_named(other)
        assert "H200" not in str(caught.value.faults[0].fix) and caught.value.faults[0].received


def test_every_card_is_whole() -> None:
    names = [name.lower() for card in CARDS for name in (card.name, *card.aliases)]
    assert len(names) == len(set(names))
    for card in CARDS:
        assert 0 < card.gemm <= 1 and card.half16 >= card.single * 0.9 and card.bandwidth > 0 and card.source
        machine = imagined(card)
        assert card_of(machine.gpus[0]) == card and machine.gpus[0].free < card.memory


def test_a_process_that_capped_itself_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch tells it: 2 GiB in use, 3 GiB kept for reuse, and no more than 15 GiB of 80 in all."""
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 1,
        memory_allocated=lambda index: 2048 * MIB,
        memory_reserved=lambda index: 5120 * MIB,
        get_per_process_memory_fraction=lambda index: 15 / 80,
    )
    gpu = Gpu("H100", 80 * 1024 * MIB, 70 * 1024 * MIB, (9, 0))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert for_process(0, gpu).free == 13 * 1024 * MIB
    assert for_process(1, gpu) == gpu  # torch does not know that one
    cuda.get_per_process_memory_fraction = lambda index: 1.0
    assert for_process(0, gpu).free == 73 * 1024 * MIB
    cuda.is_initialized = lambda: False
    assert for_process(0, gpu) == gpu
