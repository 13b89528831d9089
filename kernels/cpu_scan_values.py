"""Weighted sums of the coded residuals of values. Needs numba."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels.cpu_dots import sign_sums_1, sign_sums_4
from offload.kernels.cpu_intrinsics import as_bits, as_float
from offload.kernels.cpu_scan_tables import FLOATS

F32 = np.float32

_USUAL = 100.0
"""Times the mean: if the largest weight is less, the others are well enough in 7 bits of it."""


@njit(nogil=True, cache=True, fastmath=FLOATS)
def add_values(
    value_bits: NDArray[np.uint8],
    blocks: NDArray[np.int32],
    segments: NDArray[np.int32],
    value_scale: NDArray[np.float32],
    weights: NDArray[np.float32],
    rounded: NDArray[np.int8],
    along: NDArray[np.float32],
) -> None:
    """Add the weighted residuals of the values of blocks, along their directions.

    Weights are rounded to 7 bits of the largest, and where that is far above the mean once more,
    for what is left of them. The weights are lost.
    """
    first, units = 0, np.empty(len(weights), np.float32)
    while first < len(blocks):
        stop = first + 1
        while stop < len(blocks) and segments[stop] == segments[first]:
            stop += 1
        num_rounds = 1
        for q in range(len(weights)):
            own = weights[q, 16 * first : 16 * stop]
            largest, mean = _scale(own, value_scale[16 * first : 16 * stop])
            units[q] = max(largest / F32(127.0), F32(1e-30))
            if largest > F32(_USUAL) * mean:
                num_rounds = 2
        for _ in range(num_rounds):
            for q in range(len(weights)):
                _round(weights[q, 16 * first : 16 * stop], units[q], rounded[q])
            _add_signs(value_bits, blocks[first:stop], rounded, units, along[:, segments[first]])
            units /= F32(254.0)
        first = stop


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _scale(
    weights: NDArray[np.float32], scale: NDArray[np.float32]
) -> tuple[np.float32, np.float32]:
    """Multiply with the scales; return the largest and the mean."""
    total, largest = F32(0), np.uint32(0)
    for i in range(len(weights)):
        weights[i] *= scale[i]
        total += weights[i]
        largest = max(largest, as_bits(weights[i]))
    return as_float(largest), total / F32(len(weights))


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _round(weights: NDArray[np.float32], unit: np.float32, rounded: NDArray[np.int8]) -> None:
    """Round to whole units; what is left takes the place of the weights."""
    inverse = F32(1.0) / unit
    for i in range(len(weights)):
        whole = np.floor(weights[i] * inverse + F32(0.5))
        rounded[i] = np.int32(whole)
        weights[i] -= whole * unit


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _add_signs(
    value_bits: NDArray[np.uint8],
    blocks: NDArray[np.int32],
    rounded: NDArray[np.int8],
    units: NDArray[np.float32],
    along: NDArray[np.float32],
) -> None:
    """Add the signs of blocks of one segment, weighted with rounded weights."""
    num_queries, step = rounded.shape
    sums, q = np.empty((num_queries, 32), np.int32), 0
    signs, numbers = value_bits.ctypes.data, blocks.ctypes.data
    while q < num_queries:
        levels, target = rounded.ctypes.data + q * step, sums.ctypes.data + 128 * q
        if q + 4 <= num_queries:
            sign_sums_4(signs, numbers, len(blocks), levels, step, target)
            q += 4
        else:
            sign_sums_1(signs, numbers, len(blocks), levels, step, target)
            q += 1
    for q in range(num_queries):
        own, whole = rounded[q, : 16 * len(blocks)], np.int32(0)
        for i in range(len(own)):
            whole += own[i]
        for d in range(32):
            along[q, d] += units[q] * F32(2 * sums[q, d] - whole)
