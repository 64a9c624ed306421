"""Heavy libraries are imported while the data is read: on a machine with cold caches both take seconds."""

from __future__ import annotations

import contextlib
import importlib
from threading import Thread

from luthier.config import Config


def import_ahead(settings: Config) -> None:
    """Begin to import what training will need. What is missing is told later, by the code that needs it."""
    names = ["torch", "safetensors.torch", "luthier.train.loop", "luthier.model.decoder.load"]
    if settings.quantization is not None:
        names.append("bitsandbytes")

    def run() -> None:
        for name in names:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)

    Thread(target=run, name="import ahead").start()
