"""A step's operations over tensors, through the compiled programs. `host` has the same in torch's operations.

Names: ``r`` rows, ``n`` key heads, ``d`` width of a head, ``c`` places of a slot, ``h`` hidden, ``o`` rows of the fused
product.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch

from luthier.kernels import host
from luthier.kernels.linear import Norm

if TYPE_CHECKING:
    import numpy as np

ALONE = 16384  # numbers that one thread norms sooner than several agree on their shares
ALL = 1 << 30  # a window that leaves nothing out
LAYERS = ("omp", "tbb")  # numba's ways to threads that may be called from several at one time; its third may not

DTYPES = (torch.bfloat16, torch.float32)

_served: dict[torch.dtype, bool] = {}


def installed() -> bool:
    """Whether there is a numba."""
    return importlib.util.find_spec("numba") is not None


def tried(dtype: torch.dtype) -> bool:
    """Whether `serves` knows its answer for this type; until then it takes time to find."""
    return dtype in _served


def serves(dtype: torch.dtype) -> bool:
    """Whether steps of this type run compiled here: numba is installed, and what it compiles runs.

    A second in each process; the first time on a machine about ten, until the programs lie in numba's cache.
    """
    if dtype not in _served:
        _served[dtype] = dtype in DTYPES and _runs(dtype)
    return _served[dtype]


def _runs(dtype: torch.dtype) -> bool:
    store = torch.zeros(2, 1, 1, 4, 8, dtype=dtype)
    turn, held = (torch.zeros(1, 4), torch.zeros(1, 4)), torch.zeros(1, dtype=torch.long)
    try:
        import numba

        if "NUMBA_THREADING_LAYER" not in os.environ and "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
            numba.config.THREADING_LAYER_PRIORITY = [*LAYERS, "workqueue"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that what it compiles cannot be kept
            for shared in (False, True) if threaded() else (False,):
                attend(torch.zeros(1, 24, dtype=dtype), turn, store[0], store[1], held, 1.0, None, shared)
                normed(torch.zeros(1, 8, dtype=dtype), Norm(torch.zeros(8, dtype=dtype), 1e-5), shared)
    except Exception:  # an old numba, one without this Python or numpy, a cache that cannot be read: the plain form
        return False
    return True


@functools.cache
def threaded() -> bool:
    """Whether programs may share their work among threads."""
    import numba

    from luthier.kernels.cpu import programs

    try:
        numba.set_num_threads(1)
        x = torch.zeros(1, 8)
        programs.rms_norm_shared(_array(x), _array(x[0]), _number(1.0), _array(x))
        return numba.threading_layer() in LAYERS
    except ValueError:  # it finds no library for threads
        return False


def attend(
    qkv_ro: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor],
    k_sncd: torch.Tensor,
    v_sncd: torch.Tensor,
    held_r: torch.Tensor,
    scale: float,
    window: int | None,
    shared: bool | None = None,
) -> torch.Tensor:
    """[r, heads * d]: what one more token a row gathers from its slot, into which its key and value are put.

    ``turn``: cosines and sines [r, d / 2] fp32. ``held_r`` int64: the places of the first r slots that are filled.
    Softmax and sums run in fp32. ``shared``: by all threads; None: where they may.
    """
    from luthier.kernels.cpu import programs

    kv_heads, width = k_sncd.shape[1], k_sncd.shape[3]
    out = qkv_ro.new_empty(len(qkv_ro), qkv_ro.shape[1] - 2 * kv_heads * width)
    program = programs.attend_shared if (threaded() if shared is None else shared) else programs.attend
    program(
        _array(qkv_ro), turn[0].numpy(), turn[1].numpy(), _array(k_sncd), _array(v_sncd), held_r.numpy(),
        out.shape[1] // (kv_heads * width), window or ALL, _number(scale), _array(out),
    )  # fmt: skip
    return out


def normed(x_rh: torch.Tensor, norm: Norm, shared: bool | None = None) -> torch.Tensor:
    """[r, h] what `norm.rms_norm` gives. A row is the same beside any others, by one thread or by all."""
    if norm.offset or norm.weight.dtype != x_rh.dtype:
        return host.normed(x_rh, norm)
    from luthier.kernels.cpu import programs

    out = torch.empty_like(x_rh)
    together = x_rh.numel() > ALONE and threaded() if shared is None else shared
    program = programs.rms_norm_shared if together else programs.rms_norm
    program(_array(x_rh), _array(norm.weight), _number(norm.eps), _array(out))
    return out


def share_threads() -> None:
    """Let the programs of this thread run on as many cores as torch's operations."""
    if not threaded():
        return
    import numba

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def _array(x: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same memory; bf16, which numpy does not know, as uint16."""
    x = x.detach()
    if x.dtype == torch.bfloat16:
        x = x.view(torch.uint16)
    made: np.ndarray[Any, Any] = x.numpy()
    return made


@functools.cache
def _number(value: float) -> Any:
    import numpy as np

    return np.float32(value)
