"""The inner part of the scan for CPUs: blocks of codes in, sums and scores out. Needs numba."""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels.cpu_dots import (
    dots_1_bit_1,
    dots_1_bit_4,
    dots_2_bits_1,
    dots_2_bits_4,
    sign_sums_1,
    sign_sums_4,
)
from offload.kernels.cpu_intrinsics import as_bits, as_float, exp, from_brain, prefetch
from offload.kernels.cpu_scan_tables import FLOATS, Query, Tables

F32 = np.float32

_TILE_BLOCKS = 64
"""Blocks that are handled together, so that what is computed of them stays in the first cache."""

_AHEAD = 8
"""Blocks between the one that is worked on and the one that is being loaded."""

_USUAL = 100.0
"""Times the mean: if the largest weight is less, the others are well enough in 7 bits of it."""


class Runs(NamedTuple):
    """Consecutive scanned places of one cluster; filling counts as one more cluster.

    Attributes
    ----------
    starts : int32 [num_runs + 1]
        In scanned places: 16 for each scanned block.
    clusters : int32 [num_runs]
    segments : int32 [num_blocks]
        Of each scanned block.
    left : int32 [num_clusters]
        Keys of each cluster that are not scanned.
    """

    starts: NDArray[np.int32]
    clusters: NDArray[np.int32]
    segments: NDArray[np.int32]
    left: NDArray[np.int32]


class Sums(NamedTuple):
    """What the scanned places add up to, relative to ``peak`` of each query.

    Attributes
    ----------
    peak : float32 [num_queries]
    total, squares : float64 [num_queries]
        Of weights; of weights times the spread of their cluster, squared.
    mass : float32 [num_queries, num_clusters + 1]
    along : float32 [num_queries, num_segments, 32]
        Coded residuals of values, weighted.
    """

    peak: NDArray[np.float32]
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    mass: NDArray[np.float32]
    along: NDArray[np.float32]


@njit(nogil=True, cache=True)
def find_runs(
    counts: NDArray[np.int16], sizes: NDArray[np.int64], chosen: NDArray[np.uint8],
    blocks: NDArray[np.int32],
) -> tuple[int, Runs]:  # fmt: skip
    """List the blocks that hold a key of a chosen cluster, and whose places they are.

    Returns
    -------
    num_blocks : int
        Written to ``blocks``.
    runs : Runs
    """
    num_clusters = len(counts)
    left = counts.astype(np.int32)
    starts = np.empty(num_clusters * 2 + len(blocks) + 2, np.int32)
    clusters, segments = np.empty(len(starts), np.int32), np.empty(len(blocks), np.int32)
    num_blocks, num_runs, first_block, first_cluster = 0, 0, 0, 0
    for segment in range(len(sizes)):
        num_tokens, own_clusters = sizes[segment]
        stop_place = first_block * 16 + num_tokens
        place, last = np.int64(first_block * 16), np.int64(-1)
        for cluster in range(first_cluster, first_cluster + own_clusters):
            stop = place + counts[cluster]
            if chosen[cluster] and stop > place:
                for block in range(max(place // 16, last + 1), (stop - 1) // 16 + 1):
                    blocks[num_blocks], segments[num_blocks] = block, segment
                    num_blocks += 1
                    last = block
            place = stop
        first_block += (num_tokens + 15) // 16
        first_cluster += own_clusters
    cluster, stop, segment = np.int64(-1), np.int64(0), np.int64(-1)
    first_block, last_block, first_cluster = np.int64(0), np.int64(0), np.int64(0)
    for slot in range(num_blocks):
        place = np.int64(blocks[slot]) * 16
        while segment < segments[slot]:
            segment += 1
            if segment > 0:
                first_cluster += sizes[segment - 1, 1]
            first_block = last_block
            last_block += (sizes[segment, 0] + 15) // 16
            cluster = first_cluster
            stop = first_block * 16 + counts[cluster]
        stop_place = min(place + 16, first_block * 16 + sizes[segment, 0])
        first = place
        while first < stop_place:
            while stop <= first:
                cluster += 1
                stop += counts[cluster]
            if num_runs == 0 or clusters[num_runs - 1] != cluster:
                starts[num_runs], clusters[num_runs] = slot * 16 + first - place, cluster
                num_runs += 1
            after = min(stop, stop_place)
            left[cluster] -= after - first
            first = after
        if stop_place < place + 16:
            starts[num_runs], clusters[num_runs] = slot * 16 + stop_place - place, num_clusters
            num_runs += 1
    starts[num_runs] = num_blocks * 16
    return num_blocks, Runs(
        starts[: num_runs + 1], clusters[:num_runs], segments[:num_blocks], left
    )


@njit(nogil=True, cache=True, fastmath=FLOATS)
def scan_blocks(
    tables: Tables,
    query: Query,
    head: int,
    num_bits: int,
    noise: float,
    logits: NDArray[np.float32],
    blocks: NDArray[np.int32],
    runs: Runs,
    spread_logs: NDArray[np.float32],
    hoped: NDArray[np.float32],
    sums: Sums,
) -> float:
    """Estimate the logits of all places of some blocks, and add up what they weigh.

    Parameters
    ----------
    logits : float32 [num_queries, num_clusters + 1]
        Of the clusters; ``-inf`` for filling.
    spread_logs : float32 [num_clusters + 1]
    hoped : float32 [num_queries, num_places]
        The first 16 for every block are set to two deviations above each logit, plus the log of the
        cluster's spread.
    sums : Sums
        Set, but for ``peak``.

    Returns
    -------
    float
        The largest weight: far above one, sums have lost their precision.
    """
    num_queries, size = len(logits), 16 * _TILE_BLOCKS
    products = np.empty((num_queries, size), np.int32)
    base, logs = np.empty((num_queries, size), np.float32), np.empty(size, np.float32)
    scale, value_scale = np.empty(size, np.float32), np.empty(size, np.float32)
    weights, rounded = (
        np.empty((num_queries, size), np.float32),
        np.empty((num_queries, size), np.int8),
    )
    sums.total[:], sums.squares[:] = 0.0, 0.0
    sums.mass[:], sums.along[:] = F32(0), F32(0)
    largest, run = F32(0), 0
    for first in range(0, len(blocks), _TILE_BLOCKS):
        own_blocks = blocks[first : first + _TILE_BLOCKS]
        num_places = 16 * len(own_blocks)
        _multiply(tables, query, head, num_bits, own_blocks, products)
        _unpack_scales(tables, head, own_blocks, scale, value_scale)
        start = 16 * first
        first_run = run
        run = _spread_logits(
            runs.starts, runs.clusters, run, start, num_places, logits, spread_logs, base, logs
        )
        for q in range(num_queries):
            total, top = _weigh(
                products[q, :num_places], base[q], scale, logs, query.unit[head, q],
                query.middle[head, q], F32(noise) * query.norm[head, q], sums.peak[q],
                hoped[q, start : start + num_places], weights[q],
            )  # fmt: skip
            sums.total[q] += total
            largest = max(largest, top)
            sums.squares[q] += _add_mass(
                weights[q], tables.spread[head], runs, first_run, run, start, num_places,
                sums.mass[q],
            )  # fmt: skip
        _add_values(
            tables.value_bits[head], own_blocks, runs.segments[first:], value_scale, weights,
            rounded, sums.along,
        )  # fmt: skip
        # A run may go on in the next tile.
        if run > 0 and runs.starts[run] > start + num_places:
            run -= 1
    return largest


@njit(nogil=True, cache=True)
def _multiply(
    tables: Tables,
    query: Query,
    head: int,
    num_bits: int,
    blocks: NDArray[np.int32],
    out: NDArray[np.int32],
) -> None:
    """Multiply blocks of codes with all queries, four at a time while there are four."""
    bits, factors = tables.key_bits[head], query.bytes_[head]
    num_words, num_queries, step = bits.shape[1], factors.shape[1], out.shape[1]
    for slot in range(len(blocks)):
        codes = bits.ctypes.data + blocks[slot] * num_words * 64
        if slot + _AHEAD < len(blocks):
            ahead = np.int64(blocks[slot + _AHEAD])
            for word in range(num_words):
                prefetch(bits.ctypes.data + (ahead * num_words + word) * 64)
            prefetch(tables.value_bits[head].ctypes.data + ahead * 64)
            prefetch(tables.key_scale[head].ctypes.data + ahead * 32)
            prefetch(tables.value_scale[head].ctypes.data + ahead * 32)
        q = 0
        while q < num_queries:
            rows = factors.ctypes.data + 4 * q
            target = out.ctypes.data + 4 * (q * step + 16 * slot)
            if q + 4 <= num_queries:
                if num_bits == 2:
                    dots_2_bits_4(codes, rows, num_queries, num_words, target, step)
                else:
                    dots_1_bit_4(codes, rows, num_queries, num_words, target, step)
                q += 4
            else:
                if num_bits == 2:
                    dots_2_bits_1(codes, rows, num_queries, num_words, target, step)
                else:
                    dots_1_bit_1(codes, rows, num_queries, num_words, target, step)
                q += 1


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _unpack_scales(
    tables: Tables,
    head: int,
    blocks: NDArray[np.int32],
    scale: NDArray[np.float32],
    value_scale: NDArray[np.float32],
) -> None:
    of_keys, of_values = tables.key_scale[head], tables.value_scale[head]
    for slot in range(len(blocks)):
        place = np.int64(blocks[slot]) * 16
        keys, values = of_keys[place : place + 16], of_values[place : place + 16]
        own, own_values = scale[16 * slot : 16 * slot + 16], value_scale[16 * slot : 16 * slot + 16]
        for lane in range(16):
            own[lane] = from_brain(keys[lane])
            own_values[lane] = from_brain(values[lane])


@njit(nogil=True, cache=True)
def _spread_logits(
    starts: NDArray[np.int32],
    clusters: NDArray[np.int32],
    run: int,
    first: int,
    num_places: int,
    logits: NDArray[np.float32],
    spread_logs: NDArray[np.float32],
    base: NDArray[np.float32],
    logs: NDArray[np.float32],
) -> int:
    """Set what places have of their clusters; return the first run that begins behind them."""
    while run < len(clusters) and starts[run] < first + num_places:
        cluster = clusters[run]
        begin, end = max(starts[run] - first, 0), min(starts[run + 1] - first, num_places)
        _fill(logs[begin:end], spread_logs[cluster])
        for q in range(len(base)):
            _fill(base[q, begin:end], logits[q, cluster])
        run += 1
    return run


@njit(inline="always")
def _fill(row: NDArray[np.float32], number: np.float32) -> None:
    for i in range(len(row)):
        row[i] = number


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _weigh(
    products: NDArray[np.int32],
    base: NDArray[np.float32],
    scale: NDArray[np.float32],
    logs: NDArray[np.float32],
    unit: np.float32,
    middle: np.float32,
    noise: np.float32,
    peak: np.float32,
    hoped: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> tuple[np.float32, np.float32]:
    """Set weight and score of every place; return the sum and the largest of the weights."""
    total, largest = F32(0), np.uint32(0)
    for i in range(len(products)):
        deviation = noise * abs(scale[i])
        raw = base[i] + scale[i] * (unit * F32(products[i]) - middle)
        weight = exp(raw - F32(0.25) * deviation * deviation - peak)
        hoped[i] = raw + F32(2) * deviation + logs[i]
        weights[i] = weight
        total += weight
        largest = max(largest, as_bits(weight))
    return total, as_float(largest)


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _add_mass(
    weights: NDArray[np.float32],
    spread: NDArray[np.uint16],
    runs: Runs,
    first_run: int,
    stop_run: int,
    start: int,
    num_places: int,
    mass: NDArray[np.float32],
) -> float:
    """Add weights to their clusters; return the sum of their squares, times those of the spread."""
    squares = 0.0
    starts, clusters = runs.starts, runs.clusters
    for run in range(first_run, stop_run):
        first, second = F32(0), F32(0)
        own = weights[max(starts[run] - start, 0) : min(starts[run + 1] - start, num_places)]
        for i in range(len(own)):
            first += own[i]
            second += own[i] * own[i]
        cluster = clusters[run]
        mass[cluster] += first
        if cluster < len(spread):
            own_spread = from_brain(spread[cluster])
            squares += second * own_spread * own_spread
    return squares


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _add_values(
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
