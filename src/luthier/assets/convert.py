"""Pickled weights become safetensors, in a child process that reads them with weights_only: no code in them runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from luthier import events
from luthier.assets.bars import BarStream
from luthier.assets.cache import build_once
from luthier.assets.resolve import files_of, refuse_links_out
from luthier.errors import AssetError

LIMIT = 3600  # seconds

# It ends with its parent, however that ends: a second try must not find it still writing.
CHILD = """
import json, os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
from pathlib import Path
import torch
from safetensors.torch import save_file

source, target = map(Path, sys.argv[1:])
files = sorted(source.glob("pytorch_model*.bin")) or sorted(source.glob("*.bin"))
weight_map, total = {}, 0
for number, file in enumerate(files, 1):
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else None
    if tensors is None or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        sys.exit(f"{file.name} does not hold a mapping of names to tensors")
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}  # no shared storage
    name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
    save_file(tensors, str(target / name), metadata={"format": "pt"})
    weight_map |= dict.fromkeys(tensors, name)
    total += sum(t.numel() * t.element_size() for t in tensors.values())
    print(f"{number}/{len(files)}", flush=True)
if len(files) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
"""


def convert_pickled(folder: Path, sink: events.Sink = events.silent) -> Path:
    """A copy of a model folder with safetensors weights, beside it as ``FOLDER-safetensors``.

    Raises AssetError asset-not-found without .bin files, asset-damaged when they hold more than tensors.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir() or not any(folder.glob("*.bin")):
        raise AssetError(
            "asset-not-found",
            "there are no .bin weights to convert",
            where=str(folder),
            received=files_of(folder) if folder.is_dir() else "no such folder",
            allowed="a folder with *.bin",
            fix="name the folder of a model; one with *.safetensors needs no converting",
        )
    refuse_links_out(folder)

    def make(target: Path) -> None:
        for path in folder.iterdir():
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja") and "index" not in path.name:
                shutil.copy2(path, target / path.name)
        with events.stage(sink, "convert", f"{folder.name} to safetensors"):
            code, said = _run(folder, target, BarStream(sink, "convert", "files"))
        if code:
            raise AssetError(
                "asset-damaged",
                "the pickled weights were not converted: they are damaged or hold more than tensors",
                where=str(folder),
                received=(said.strip().splitlines() or ["no message"])[-1],
                allowed="whole .bin files that hold tensors alone",
                fix="download the model again, or use one with *.safetensors",
            )

    return build_once(folder.with_name(f"{folder.name}-safetensors"), make)


def _run(source: Path, target: Path, bar: BarStream) -> tuple[int, str]:
    """The child's exit code and what it said on stderr; the files it has done go to ``bar``."""
    command = [sys.executable, "-I", "-c", CHILD, str(source), str(target)]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        overdue = threading.Timer(LIMIT, child.kill)
        overdue.start()
        try:
            assert child.stdout is not None, "a pipe was asked for"
            for line in child.stdout:
                bar.write(line)
            code = child.wait()
        finally:
            overdue.cancel()
            child.kill()
        errors.seek(0)
        return code, errors.read()
