"""Tensors that are lifted piece by piece are those of the file, whatever their type and size."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from luthier.errors import AssetError
from luthier.model.decoder import files
from luthier.model.decoder.files import Files, Lift

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "one": ((1,), torch.float32),
    "odd": ((37, 53), torch.bfloat16),
    "whole": ((16, 64), torch.float16),  # pieces of the very size
    "codes": ((1001,), torch.uint8),
    "wide": ((3, 4099), torch.float64),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(5)
    for number, names in enumerate((("one", "odd", "codes"), ("whole", "wide"))):
        made = {n: (torch.randn(SHAPES[n][0], generator=draw) * 50).to(SHAPES[n][1]) for n in names}
        save_file(made, tmp_path / f"model-{number}.safetensors")
    return tmp_path


def opened(folder: Path, stack: ExitStack, device: str) -> Files:
    found = Files(folder, stack, device)
    if device == "cpu":  # where reading maps; the pieces are cut and put together in the same way
        found._lift = stack.enter_context(Lift("cpu"))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", [7, 1024, 2**20])
def test_pieces_come_together_in_their_places(
    folder: Path, device: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE", piece)
    with ExitStack() as stack:
        there = opened(folder, stack, device)
        lifted = {name: there.to_device(name, shape) for name, (shape, _) in SHAPES.items()}
        for name, value in lifted.items():
            mapped = there.read(name, SHAPES[name][0])
            assert value.device.type == device and value.dtype == mapped.dtype == SHAPES[name][1]
            assert torch.equal(value.cpu(), mapped) and value.data_ptr() != mapped.data_ptr()


def test_a_file_that_became_shorter_is_named(folder: Path) -> None:
    with ExitStack() as stack:
        there = opened(folder, stack, "cpu")
        path, place = there._places["wide"]
        there._places["wide"] = path, replace(place, begin=place.begin + 2**20)
        with pytest.raises(AssetError, match="wide cannot be read from model-1") as caught:
            there.to_device("wide", SHAPES["wide"][0])
    assert caught.value.code == "asset-damaged"
