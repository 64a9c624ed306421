"""Luthier fine-tunes language models: you declare the math, Luthier plans the execution."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LuthierError", "Model", "__version__"]

if TYPE_CHECKING:
    from luthier.api import Model
    from luthier.errors import LuthierError

# A plan reads GPUs from nvidia-smi, which numbers them by their place on the bus; CUDA puts the fastest first unless it
# is told otherwise before its first call. Here, since nothing of Luthier can import torch before.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def __getattr__(name: str) -> Any:
    # Lazy, so that `import luthier` costs nothing: Model brings in torch when it is used, not when it is named.
    if name == "Model":
        from luthier.api import Model

        return Model
    if name == "LuthierError":
        from luthier.errors import LuthierError

        return LuthierError
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")
