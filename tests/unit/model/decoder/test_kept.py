"""A base in 4 bits that was kept has the very bytes of one that is quantised anew, whatever befalls its files."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import examples, make

from luthier.assets import cache
from luthier.data.collate import collate
from luthier.errors import AssetError
from luthier.kernels.nf4 import Packed
from luthier.model.decoder import kept, load
from luthier.model.decoder.decoder import Decoder
from luthier.model.decoder.files import Files
from luthier.model.decoder.kept import Keeping
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.shape import read_shape

NF4 = Placing(torch.float32, quantised="nf4", weights="quantised")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("llama")
    make(where, "llama")
    return where


class Told(list[str]):
    """What a loading said; ``keeping`` says it."""

    def keeping(self, root: Path, **other: Any) -> Keeping:
        return Keeping(root, "hash", tell=self.append, **other)


def opened(folder: Path, keeping: Keeping | None, how: Placing = NF4) -> Decoder:
    return load_decoder(folder, read_shape(folder), how, keeping=keeping)


def kept_in(root: Path) -> list[Path]:
    """Whole folders and whatever else lies beside them."""
    where = root / "quantised"
    return sorted(where.iterdir()) if where.is_dir() else []


def tensors(decoder: Decoder) -> list[Any]:
    """All that the matrices hold, in order."""
    found: list[Any] = []
    for layer in decoder.layers:
        for product in layer.products.values():  # type: ignore[union-attr, operator]
            parts = getattr(product.matrix, "parts", None) or [product.matrix.weight]
            for part in parts:
                found += [getattr(part, one.name) for one in fields(Packed)] if isinstance(part, Packed) else [part]
    return found


def equal(ours: Decoder, theirs: Decoder) -> None:
    mine, other = tensors(ours), tensors(theirs)
    assert len(mine) == len(other) > 0
    for a, b in zip(mine, other, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        else:
            assert a == b
    batch = collate(examples())
    assert torch.equal(ours.logprobs(batch), theirs.logprobs(batch))


def no_quantising(patch: pytest.MonkeyPatch) -> None:
    """From here on neither is anything quantised nor a matrix of a layer read from the base's files."""
    read = Files.read

    def other(self: Files, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        assert not name.endswith("_proj.weight"), name
        return read(self, name, shape)

    patch.setattr(Files, "read", other)
    patch.setattr(load, "quantise", lambda *_, **__: pytest.fail("quantised anew"))


@pytest.mark.parametrize("weights", ["resident", "quantised", "streamed"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_is_read_is_what_quantising_gives(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, double: bool, weights: Any
) -> None:
    how, told = Placing(torch.float32, quantised=kind, double=double, weights=weights), Told()
    plain = opened(folder, None, how)
    equal(opened(folder, told.keeping(tmp_path), how), plain)
    assert len(kept_in(tmp_path)) == 1 and len(told) == 1 and "is kept in" in told[0]
    no_quantising(monkeypatch)
    equal(opened(folder, told.keeping(tmp_path, writes=False), how), plain)
    assert len(told) == 1


@pytest.mark.parametrize("case", ["phi3", "gemma2"])
def test_other_architectures_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    make(tmp_path, case)
    plain = opened(tmp_path, None)
    opened(tmp_path, Told().keeping(tmp_path))
    no_quantising(monkeypatch)
    equal(opened(tmp_path, Told().keeping(tmp_path)), plain)


def test_placements_share_what_is_kept(folder: Path, tmp_path: Path) -> None:
    for weights in ("resident", "quantised", "streamed"):
        opened(folder, Told().keeping(tmp_path), replace(NF4, weights=weights))  # type: ignore[arg-type]
    assert len(kept_in(tmp_path)) == 1


def test_what_decides_the_codes_is_in_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"kind": "nf4", "double": True, "dtype": torch.bfloat16, "device": "cpu"}
    keeping = Keeping(tmp_path, "hash")
    names = [keeping.folder(**how)]  # type: ignore[arg-type]
    names.append(Keeping(tmp_path, "other").folder(**how))  # type: ignore[arg-type]
    others = ({"kind": "fp4"}, {"double": False}, {"dtype": torch.float16})
    names += [keeping.folder(**(how | other)) for other in others]  # type: ignore[arg-type]
    for owner, name, value in (
        (torch, "get_num_threads", lambda: 99),
        (torch, "__version__", "0"),
        (kept.metadata, "version", lambda package: "0"),
        (kept, "code_hash", lambda *paths: "other code"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            names.append(keeping.folder(**how))  # type: ignore[arg-type]
    assert len(set(names)) == len(names) and keeping.folder(**how) == names[0]  # type: ignore[arg-type]


def truncated(made: Path) -> None:
    path = made / "layer-1.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def flipped(place: int) -> Any:
    def damage(made: Path) -> None:
        path = made / "layer-1.safetensors"
        content = bytearray(path.read_bytes())
        content[place] ^= 4
        path.write_bytes(content)

    return damage


@pytest.mark.parametrize("remembered", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        truncated, flipped(0), flipped(20), flipped(-100),
        lambda made: (made / "layer-1.safetensors").unlink(),
        lambda made: (made / kept.RECORD).unlink(),
        lambda made: (made / kept.RECORD).write_text("{"),
        lambda made: (made / kept.RECORD).write_text("[]"),
        lambda made: (made / kept.RECORD).write_text("{}"),
    ],
    ids=["short", "length", "header", "data", "file", "record", "no json", "list", "empty"],
)  # fmt: skip
def test_damage_is_told_and_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, remembered: bool
) -> None:
    plain = opened(folder, None)
    opened(folder, Told().keeping(tmp_path))
    if remembered:  # the hashes of the whole files
        opened(folder, Told().keeping(tmp_path))
    (made,) = kept_in(tmp_path)
    damage(made)
    told = Told()
    equal(opened(folder, told.keeping(tmp_path)), plain)
    assert len(told) == 2 and "is damaged" in told[0] and "is kept in" in told[1]
    no_quantising(monkeypatch)
    equal(opened(folder, told.keeping(tmp_path)), plain)
    assert len(told) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from luthier.model.decoder import kept
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.shape import read_shape

folder, root, at, threads = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
torch.set_num_threads(threads)
save, saved = kept.save_file, []

def dying(parts, path):
    if len(saved) == at:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    saved.append(path)
    save(parts, path)

kept.save_file = dying
how = Placing(torch.float32, quantised="nf4", weights="quantised")
load_decoder(folder, read_shape(folder), how, keeping=kept.Keeping(root, "hash"))
"""


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_kill_leaves_nothing_that_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    told = [str(folder), str(tmp_path), str(at), str(torch.get_num_threads())]
    killed = subprocess.run([sys.executable, "-c", KILLED, *told], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any(one.name.endswith(".partial") for one in kept_in(tmp_path))
    said = Told()
    opened(folder, said.keeping(tmp_path))
    (made,) = kept_in(tmp_path)
    assert len(said) == 1 and not made.name.endswith(".partial")
    no_quantising(monkeypatch)
    opened(folder, said.keeping(tmp_path))


@pytest.mark.parametrize("at", [0, 2])
def test_a_disk_that_fills_up_is_told_and_costs_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    save, saved, told = kept.save_file, [], Told()

    def full(parts: Any, path: Path) -> None:
        if len(saved) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(path)
        save(parts, path)

    monkeypatch.setattr(kept, "save_file", full)
    equal(opened(folder, told.keeping(tmp_path)), opened(folder, None))
    assert kept_in(tmp_path) == [] and len(told) == 1 and "is not kept" in told[0] and "GiB free" in told[0]


@pytest.mark.parametrize("double", [True, False])
def test_a_disk_without_room_is_not_begun(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, double: bool
) -> None:
    how = replace(NF4, double=double)
    made = opened(folder, None, how)
    packed = [part for layer in made.layers for op in layer.products.values() for part in op.matrix.parts]  # type: ignore
    size = sum(part.nbytes - (part.scale_table.nbytes if double else 0) for part in packed)
    usage = shutil.disk_usage(tmp_path)
    for share, kept_there in ((2.0, 0), (2.3, 1)):  # as much again stays free, and a tenth
        told, free = Told(), int(share * size)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        equal(opened(folder, told.keeping(tmp_path), how), made)
        assert len(kept_in(tmp_path)) == kept_there and ("is not kept" in told[0]) is not bool(kept_there)


def test_a_cache_that_cannot_be_written_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("where a folder should be")
    told = Told()
    equal(opened(folder, told.keeping(tmp_path / "cache")), opened(folder, None))
    assert len(told) == 1 and "is not kept" in told[0]


def test_a_cache_whose_hashes_cannot_be_written_is_left_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(folder, Told().keeping(tmp_path))
    before, told = kept_in(tmp_path), Told()

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache, "write_json", refused)
    equal(opened(folder, told.keeping(tmp_path)), opened(folder, None))
    assert kept_in(tmp_path) == before and len(told) == 1 and "cannot be read" in told[0]


def test_a_loading_that_fails_keeps_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, told = Files.read, Told()

    def missing(self: Files, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return read(self, name.replace("2.mlp", "none"), shape)

    monkeypatch.setattr(Files, "read", missing)
    with pytest.raises(AssetError):
        opened(folder, told.keeping(tmp_path))
    assert kept_in(tmp_path) == [] and told == []


def test_only_who_writes_does(folder: Path, tmp_path: Path) -> None:
    opened(folder, Told().keeping(tmp_path, writes=False))
    opened(folder, Told().keeping(tmp_path), Placing(torch.float32))  # not in 4 bits
    assert kept_in(tmp_path) == []


def test_several_at_once_keep_one(folder: Path, tmp_path: Path) -> None:
    plain, told = opened(folder, None), Told()
    begun, found = threading.Barrier(3), []

    def work() -> None:
        begun.wait()
        found.append(opened(folder, told.keeping(tmp_path)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(kept_in(tmp_path)) == 1 and not [text for text in told if "is kept in" not in text]
    for one in found:
        equal(one, plain)


def test_one_who_comes_while_another_writes_goes_without(folder: Path, tmp_path: Path) -> None:
    where = Keeping(tmp_path, "hash").folder(kind="nf4", double=True, dtype=torch.float32, device="cpu")
    where.parent.mkdir(parents=True)
    handle, told = cache._held(where.with_name(f"{where.name}.lock"), where, 0), Told()
    try:
        equal(opened(folder, told.keeping(tmp_path)), opened(folder, None))
        assert told == [] and not where.exists()
    finally:
        os.close(handle)
