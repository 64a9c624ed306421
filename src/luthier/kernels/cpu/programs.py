"""The loops themselves. Arrays hold fp32, or bf16 as the 16 bits that torch keeps of it; sums run in fp32.

All in one file: numba compiles anew what it keeps of a file when that file changes, and asks for no other.

Names: ``r`` rows, ``n`` key heads, ``g`` queries of each, ``d`` width of a head, ``c`` places of a slot, ``h`` hidden.
"""

from __future__ import annotations

import llvmlite.ir as ir
import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic, overload

LOG2_E = np.float32(1.4426950408889634)
LEAST = np.float32(-3.0e38)
TINY = np.float32(-126)  # the least power of two that is a normal number


# ----------------------------------------------------------------------------------------------------------- numbers


@intrinsic
def _float_of(typing, bits):
    """The fp32 number that has these 32 bits."""
    made = types.float32(types.uint32)
    return made, lambda context, builder, signature, given: builder.bitcast(given[0], ir.FloatType())


@intrinsic
def _bits_of(typing, number):
    """The 32 bits of an fp32 number."""
    made = types.uint32(types.float32)
    return made, lambda context, builder, signature, given: builder.bitcast(given[0], ir.IntType(32))


def wide(x):
    """A number of an array as fp32."""
    raise NotImplementedError


@overload(wide, inline="always")
def _wide(x):
    if x == types.uint16:
        return lambda x: _float_of(np.uint32(x) << np.uint32(16))
    return lambda x: x


def narrow(x, like):
    """An fp32 number as arrays of the type of ``like`` keep it; bf16 rounds to the nearest, of two the even one."""
    raise NotImplementedError


@overload(narrow, inline="always")
def _narrow(x, like):
    if like == types.uint16:
        return lambda x, like: _rounded(x)
    return lambda x, like: x


@njit(inline="always")
def _rounded(x):
    bits = _bits_of(x)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@njit(inline="always", fastmath=True)
def power_of_two(x):
    """2 to the ``x``, which is at most 0, within 2e-7 of it: the exponent from the whole part, the rest a polynomial.

    Its coefficients have the least largest relative error on [0, 1] of all of degree 5 (7.5e-8 before rounding).
    """
    x = max(x, TINY)
    whole = np.floor(x)
    part = x - whole
    power = np.float32(1.8775767e-3)
    power = power * part + np.float32(8.9893397e-3)
    power = power * part + np.float32(5.5826318e-2)
    power = power * part + np.float32(2.4015361e-1)
    power = power * part + np.float32(6.9315308e-1)
    power = power * part + np.float32(9.9999994e-1)
    return power * _float_of(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


# -------------------------------------------------------------------------------------------------------- operations


@njit(fastmath=True, inline="always")
def _turn(x, cos, sin, out):
    """Rotate the two halves of a head, rounded as they are kept."""
    half = cos.shape[0]
    for i in range(half):
        low, high = wide(x[i]), wide(x[half + i])
        out[i] = narrow(low * cos[i] - high * sin[i], x[0])
        out[half + i] = narrow(high * cos[i] + low * sin[i], x[0])


@njit(fastmath=True, cache=True, nogil=True)
def _attend_pair(qkv, cos, sin, keys, values, last, n, group, window, scale, out):
    """The queries of one row that share key head ``n``; all but that head's store [c, d] are of the row."""
    kv_heads, width = keys.shape[0], keys.shape[2]
    own_keys, own_values = keys[n], values[n]
    start_k = (kv_heads * group + n) * width
    start_v = start_k + kv_heads * width
    _turn(qkv[start_k : start_k + width], cos, sin, own_keys[last])
    for i in range(width):
        own_values[last, i] = qkv[start_v + i]
    first = max(0, last + 1 - window)
    seen = last + 1 - first

    scores = np.empty((group, seen), np.float32)
    turned = np.empty(width, qkv.dtype)
    query = np.empty(width, np.float32)
    for g in range(group):
        start = (n * group + g) * width
        _turn(qkv[start : start + width], cos, sin, turned)
        for i in range(width):
            query[i] = wide(turned[i]) * (scale * LOG2_E)
        own = scores[g]
        for c in range(seen):
            key = own_keys[first + c]
            score = np.float32(0)
            for i in range(width):
                score += query[i] * wide(key[i])
            own[c] = score
        top = LEAST
        for c in range(seen):
            top = max(top, own[c])
        total = np.float32(0)
        for c in range(seen):
            weight = power_of_two(own[c] - top)
            own[c] = weight
            total += weight
        for c in range(seen):
            own[c] /= total

    sums = np.zeros((group, width), np.float32)
    for c in range(seen):
        value = own_values[first + c]
        for g in range(group):
            weight, own = scores[g, c], sums[g]
            for i in range(width):
                own[i] += weight * wide(value[i])
    for g in range(group):
        for i in range(width):
            out[(n * group + g) * width + i] = narrow(sums[g, i], qkv[0])


@njit(fastmath=True, cache=True, nogil=True)
def attend(qkv, cos, sin, keys, values, lengths, group, window, scale, out):
    """Rotate queries and keys of one token a row, keep its key and value, and attend to what its slot then holds.

    ``qkv`` [r, (n g + 2 n) d], ``cos`` and ``sin`` [r, d / 2], ``keys`` and ``values`` [slots, n, c, d], ``lengths``
    [r] places of each slot that were filled before, ``out`` [r, n g d]. Only the last ``window`` places are seen.
    """
    for r in range(qkv.shape[0]):
        for n in range(keys.shape[1]):
            _attend_pair(qkv[r], cos[r], sin[r], keys[r], values[r], lengths[r], n, group, window, scale, out[r])


@njit(parallel=True, fastmath=True, cache=True, nogil=True)
def attend_shared(qkv, cos, sin, keys, values, lengths, group, window, scale, out):
    """`attend` by all threads."""
    kv_heads = keys.shape[1]
    for pair in prange(qkv.shape[0] * kv_heads):
        r, n = pair // kv_heads, pair % kv_heads
        _attend_pair(qkv[r], cos[r], sin[r], keys[r], values[r], lengths[r], n, group, window, scale, out[r])


@njit(fastmath=True, cache=True, nogil=True)
def _norm_row(x, weight, eps, out):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += wide(x[i]) * wide(x[i])
    rstd = np.float32(1) / np.sqrt(total / np.float32(x.shape[0]) + eps)
    for i in range(x.shape[0]):
        out[i] = narrow(wide(narrow(wide(x[i]) * rstd, x[0])) * wide(weight[i]), x[0])


@njit(fastmath=True, cache=True, nogil=True)
def rms_norm(x, weight, eps, out):
    """Rows of ``x`` [r, h] over their root mean square, rounded, times ``weight`` [h] (as `kernels.norm.rms_norm`)."""
    for r in range(x.shape[0]):
        _norm_row(x[r], weight, eps, out[r])


@njit(parallel=True, fastmath=True, cache=True, nogil=True)
def rms_norm_shared(x, weight, eps, out):
    """`rms_norm` by all threads."""
    for r in prange(x.shape[0]):
        _norm_row(x[r], weight, eps, out[r])
