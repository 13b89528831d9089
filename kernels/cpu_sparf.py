"""The compiled part of ``kernels.sparf``, which has the definitions. Needs numba."""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels import cpu_sparf_tiles as tiles
from offload.kernels.cpu_intrinsics import as_float, load_u8, sortable, unsortable
from offload.kernels.cpu_scan_tables import FLOATS
from offload.kernels.cpu_select import cut_at, ordered

F32, U32, I32 = np.float32, np.uint32, np.int32
Floats = NDArray[np.float32]
Places = NDArray[np.int64]

_LEAST = F32(np.finfo(np.float32).min)

_TILE_TOKENS = 1024
"""Of which the softmax is computed together; they and their weights stay in the first cache."""

_LOG_2_E = F32(1.4426950408889634)
_LOG_2_HIGH, _LOG_2_LOW = F32(0.693359375), F32(-2.1219444e-4)
"""Their sum is the logarithm of 2; the first has so few bits that its products are exact."""
_LOWEST = F32(-87.0)
"""Where ``e`` to a power stops to be an ordinary float32; below, it is zero."""


@njit(nogil=True, cache=True)
def approximate(
    query: Floats,
    channels: Places,
    coverage: Floats,
    addresses: Places,
    scales: Floats,
    block: Places,
    column: Places,
    piece_tokens: int,
) -> Floats:
    """Return approximate logits, as ``kernels.sparf.approximate`` does."""
    num_heads, num_queries, _ = query.shape
    logits = np.empty((num_heads, num_queries, len(block) * piece_tokens), np.float32)
    weights = np.empty((num_queries, channels.shape[1]), np.float32)
    for head in range(num_heads):
        weighed = -1
        for piece in range(len(block)):
            if block[piece] != weighed:
                weighed = block[piece]
                _weigh(query[head], channels[head], coverage[head], scales[weighed, head], weights)
            first = piece * piece_tokens
            _add_channels(
                addresses[weighed, head],
                column[piece] * piece_tokens,
                weights,
                logits[head, :, first : first + piece_tokens],
            )
    return logits


@njit(nogil=True, cache=True)
def _weigh(
    query: Floats, channels: Places, coverage: Floats, scales: Floats, weights: Floats
) -> None:
    """Set what a code of each channel adds to the logit of each query."""
    for q in range(len(query)):
        factor = F32(1) / np.sqrt(coverage[q])
        for i in range(len(channels)):
            weights[q, i] = query[q, channels[i]] * factor * scales[i]


@njit(nogil=True, cache=True)
def _add_channels(rows: Places, offset: int, weights: Floats, logits: Floats) -> None:
    """Set logits of tokens whose codes begin at ``offset`` in each row; 64 while there are 64."""
    num_queries, num_rows = weights.shape
    num_tokens, step = logits.shape[1], logits.strides[0] // 4
    place, token = rows.ctypes.data, 0
    while token + 16 <= num_tokens:
        is_wide, q = token + 64 <= num_tokens, 0
        while q < num_queries:
            own = weights.ctypes.data + 4 * q * num_rows
            out = logits.ctypes.data + 4 * (q * step + token)
            if q + 4 <= num_queries:
                if is_wide:
                    tiles.tile_4_64(place, num_rows, offset + token, own, out, step)
                else:
                    tiles.tile_4_16(place, num_rows, offset + token, own, out, step)
                q += 4
            else:
                if is_wide:
                    tiles.tile_1_64(place, num_rows, offset + token, own, out, step)
                else:
                    tiles.tile_1_16(place, num_rows, offset + token, own, out, step)
                q += 1
        token += 64 if is_wide else 16
    for late in range(token, num_tokens):
        for q in range(num_queries):
            total = F32(0)
            for i in range(num_rows):
                total += weights[q, i] * F32(np.int8(load_u8(rows[i], offset + late)))
            logits[q, late] = total


@njit(nogil=True, cache=True)
def choose_groups(logits: Floats, group_tokens: int, num_chosen: int) -> tuple[Places, Floats]:
    """Return the groups with most of the softmax, and what each query has there.

    Parameters
    ----------
    logits : float32 [num_heads, num_queries, num_tokens]
    group_tokens : int
        Divides ``num_tokens``.
    num_chosen : int
        At most the number of groups.

    Returns
    -------
    groups : int64 [num_heads, num_chosen]
        Ascending.
    shares : float32 [num_heads, num_queries, num_chosen]
        Of the softmax of each query.
    """
    num_heads, num_queries, num_tokens = logits.shape
    num_groups = num_tokens // group_tokens
    groups = np.empty((num_heads, num_chosen), np.int64)
    chosen = np.empty((num_heads, num_queries, num_chosen), np.float32)
    shares = np.empty((num_queries, num_groups), np.float32)
    keys, one = np.empty(num_groups, np.uint32), np.ones(1, np.int16)
    for head in range(num_heads):
        for q in range(num_queries):
            _share(logits[head, q], group_tokens, shares[q])
        for group in range(num_groups):
            mass = F32(0)
            for q in range(num_queries):
                mass += shares[q, group]
            keys[group] = ordered(mass)
        _take(keys, *cut_at(keys, one, num_chosen), groups[head])
        for q in range(num_queries):
            for i in range(num_chosen):
                chosen[head, q, i] = shares[q, groups[head, i]]
    return groups, chosen


@njit(nogil=True, cache=True)
def _take(keys: NDArray[np.uint32], lowest: np.uint32, num_lowest: int, groups: Places) -> None:
    """Set the numbers of keys that are larger, and of the first of those that are equal."""
    number = 0
    for i in range(len(keys)):
        is_equal = keys[i] == lowest
        if keys[i] > lowest or (is_equal and num_lowest > 0):
            num_lowest -= is_equal
            groups[number] = i
            number += 1


@njit(nogil=True, cache=True)
def _share(logits: Floats, group_tokens: int, shares: Floats) -> None:
    """Set the share of the softmax of each group, reading the logits once."""
    tile_groups = max(1, _TILE_TOKENS // group_tokens)
    num_tiles = -(-len(shares) // tile_groups)
    peaks = np.empty(num_tiles, np.float32)
    weights = np.empty(tile_groups * group_tokens, np.float32)
    peak = F32(-np.inf)
    for tile in range(num_tiles):
        own = shares[tile * tile_groups : (tile + 1) * tile_groups]
        first = tile * len(weights)
        tokens = logits[first : first + len(own) * group_tokens]
        peak = max(peak, _peak_of(tokens))
        peaks[tile] = peak
        _exponentiate(tokens, max(peak, _LEAST), weights)
        for group in range(len(own)):
            own[group] = _sum(weights[group * group_tokens : (group + 1) * group_tokens])
    total = 0.0
    for tile in range(num_tiles):
        peaks[tile] = math.exp(peaks[tile] - peak) if peaks[tile] > F32(-np.inf) else 0.0
        total += peaks[tile] * _sum(shares[tile * tile_groups : (tile + 1) * tile_groups])
    for tile in range(num_tiles):
        own = shares[tile * tile_groups : (tile + 1) * tile_groups]
        if total > 0:
            own *= F32(peaks[tile] / total)
        else:
            own[:] = F32(1) / F32(len(shares))


@njit(nogil=True, cache=True)
def _peak_of(logits: Floats) -> np.float32:
    """Return the largest logit, at most the largest finite number; NaN counts as the least."""
    peak = I32(sortable(F32(-np.inf)))
    for i in range(len(logits)):
        key = I32(sortable(logits[i]))
        peak = max(peak, key if key <= I32(0x7F800000) else I32(-0x7FFFFFFF))
    return unsortable(min(peak, I32(0x7F7FFFFF)))


@njit(nogil=True, cache=True)
def _exponentiate(logits: Floats, peak: np.float32, weights: Floats) -> None:
    """Set ``e`` to the power of logits less their peak, to 3e-7, on all lanes at once."""
    for i in range(len(logits)):
        number = logits[i] - peak
        is_some = number >= _LOWEST
        power = min(number, F32(0)) if is_some else F32(0)
        whole = np.floor(power * _LOG_2_E + F32(0.5))
        part = (power - whole * _LOG_2_HIGH) - whole * _LOG_2_LOW
        value = F32(1 / 720)
        value = value * part + F32(1 / 120)
        value = value * part + F32(1 / 24)
        value = value * part + F32(1 / 6)
        value = value * part + F32(1 / 2)
        value = value * part + F32(1)
        value = value * part + F32(1)
        unit = as_float(U32((I32(whole) + I32(127)) << I32(23)))
        weights[i] = value * unit if is_some else F32(0)


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _sum(numbers: Floats) -> np.float32:
    total = F32(0)
    for i in range(len(numbers)):
        total += numbers[i]
    return total
