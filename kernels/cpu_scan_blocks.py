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
)
from offload.kernels.cpu_intrinsics import exp, from_brain, prefetch, sortable, unsortable
from offload.kernels.cpu_scan_runs import Runs
from offload.kernels.cpu_scan_tables import FLOATS, Query, Tables
from offload.kernels.cpu_scan_values import add_values

F32 = np.float32

_TILE_BLOCKS = 64
"""Blocks that are handled together, so that what is computed of them stays in the first cache."""

_AHEAD = 8
"""Blocks between the one that is worked on and the one that is being loaded."""


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
) -> NDArray[np.float32]:
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
    float32 [num_queries]
        The highest logit of each query, relative to ``peak``: far from zero, sums have lost their
        precision.
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
    highest, run = np.full(num_queries, F32(-np.inf)), 0
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
            highest[q] = max(highest[q], top)
            sums.squares[q] += _add_mass(
                weights[q], tables.spread[head], runs, first_run, run, start, num_places,
                sums.mass[q],
            )  # fmt: skip
        add_values(
            tables.value_bits[head], own_blocks, runs.segments[first:], value_scale, weights,
            rounded, sums.along,
        )  # fmt: skip
        # A run may go on in the next tile.
        if run > 0 and runs.starts[run] > start + num_places:
            run -= 1
    return highest


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
    """Set weight and score of every place; return the sum of weights, and the highest logit."""
    total, highest = F32(0), np.int32(-0x7FFFFFFF)
    for i in range(len(products)):
        deviation = noise * abs(scale[i])
        raw = base[i] + scale[i] * (unit * F32(products[i]) - middle)
        logit = raw - F32(0.25) * deviation * deviation - peak
        weight = exp(logit)
        hoped[i] = raw + F32(2) * deviation + logs[i]
        weights[i] = weight
        total += weight
        highest = max(highest, sortable(logit))
    return total, unsortable(highest)


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
        if cluster < len(mass) - 1:
            own_spread = from_brain(spread[cluster])
            squares += second * own_spread * own_spread
    return squares
