"""Rows of any float as float32 and back, and the rounding of scales, inside of compiled kernels.

Needs numba.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels.cpu_intrinsics import as_bits, as_float, from_brain, from_half, to_half
from offload.kernels.cpu_products import BRAIN, FLOAT

F32 = np.float32
U32 = np.uint32

LEAST_PEAK, MOST_PEAK = np.uint32(0x3C800000), np.uint32(0x47000000)
"""Bits of 2**-6 and 2**15: what ``choose_shift`` leaves as it is lies between, or is zero."""


@njit(nogil=True, cache=True)
def widen(rows: NDArray[np.uint8], kind: int, wide: NDArray[np.float32]) -> np.uint32:
    """Set float32 numbers, and return the bits of the largest absolute value (of NaN if any)."""
    if kind == FLOAT:
        wide[:] = rows.view(np.float32)
    elif kind == BRAIN:
        bits = rows.view(np.uint16)
        for i in range(len(wide)):
            wide[i] = from_brain(bits[i])
    else:
        bits = rows.view(np.uint16)
        for i in range(len(wide)):
            wide[i] = from_half(bits[i])
    peak = U32(0)
    own = wide.view(np.uint32)
    for i in range(len(own)):
        peak = max(peak, own[i] & U32(0x7FFFFFFF))
    return peak


@njit(nogil=True, cache=True)
def narrow(wide: NDArray[np.float32], kind: int, rows: NDArray[np.uint8]) -> None:
    """Round float32 numbers, none of them NaN, to the dtype of ``rows``."""
    if kind == FLOAT:
        rows.view(np.float32)[:] = wide
    elif kind == BRAIN:
        bits, own = rows.view(np.uint16), wide.view(np.uint32)
        for i in range(len(wide)):
            odd = (own[i] >> U32(16)) & U32(1)
            bits[i] = np.uint16((own[i] + U32(0x7FFF) + odd) >> U32(16))
    else:
        bits = rows.view(np.uint16)
        for i in range(len(wide)):
            bits[i] = to_half(wide[i])


@njit(inline="always")
def half_above(number: np.float32) -> np.float32:
    """Return what ``kernels.kivi.half_above`` does, as a float32."""
    coarse: np.float32 = as_float((as_bits(number) + U32(0x1FFF)) & U32(0xFFFFE000))
    fine = np.ceil(number * F32(2.0**24)) * F32(2.0**-24)
    return coarse if number >= F32(2.0**-14) else fine + F32(0)


@njit(inline="always")
def half_below(number: np.float32) -> np.float32:
    """Return what ``kernels.kivi.half_below`` does, as a float32; zero without a sign."""
    bits = as_bits(number)
    away = U32(0x1FFF) if number < F32(0) else U32(0)
    coarse: np.float32 = as_float((bits + away) & U32(0xFFFFE000))
    fine = np.floor(number * F32(2.0**24)) * F32(2.0**-24)
    return coarse if abs(number) >= F32(2.0**-14) else fine + F32(0)
