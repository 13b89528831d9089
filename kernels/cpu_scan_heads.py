"""The scan of ``kernels.scan`` for CPUs, head by head. Needs numba.

Unlike the reference, all that is scanned enters the sums at once, and what turns out to be a hit is
taken out again: logits never leave the cache.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels.cpu_dots import row_dots_1, row_dots_4
from offload.kernels.cpu_intrinsics import exp, from_brain, from_half
from offload.kernels.cpu_scan_blocks import Sums, scan_blocks
from offload.kernels.cpu_scan_runs import Runs, find_runs
from offload.kernels.cpu_scan_tables import FLOATS, Found, Query, Tables
from offload.kernels.cpu_select import best, cut_at, ordered
from offload.kernels.scan import DEVIATIONS

F32 = np.float32

_LOWEST, _HIGHEST = -20.0, 35.0
"""Where the highest logit may lie, relative to what sums are relative to."""

_MAX_ROUNDS = 3
"""More do not help: logits of 1e8 have no decimals."""


@njit(nogil=True, cache=True)
def scan_heads(
    first_head: int,
    step: int,
    tables: Tables,
    sizes: NDArray[np.int64],
    num_bits: int,
    query: Query,
    wanted: int,
    takes_max: bool,
    noise: float,
    logs: NDArray[np.float32],
    logs_of_brains: NDArray[np.float32],
    found: Found,
) -> None:
    """Scan heads ``first_head``, ``first_head + step`` and so on."""
    # Tables may go on behind what is scanned: indexes are cut without being copied.
    num_heads, num_clusters, num_places = len(tables.counts), np.int64(0), np.int64(0)
    for segment in range(len(sizes)):
        num_places += (sizes[segment, 0] + 15) // 16 * 16
        num_clusters += sizes[segment, 1]
    num_queries = query.norm.shape[1]
    logits = np.empty((num_queries, num_clusters + 1), np.float32)
    spread_logs = np.zeros(num_clusters + 1, np.float32)
    hoped = np.empty((num_queries, num_places), np.float32)
    blocks = np.empty(num_places // 16, np.int32)
    sums = Sums(
        np.empty(num_queries, np.float32),
        np.empty(num_queries, np.float64),
        np.empty(num_queries, np.float64),
        np.empty((num_queries, num_clusters + 1), np.float32),
        np.empty((num_queries, len(sizes), 32), np.float32),
    )
    for head in range(first_head, num_heads, step):
        counts = tables.counts[head, :num_clusters]
        _score_clusters(tables, query, head, logits)
        for cluster in range(num_clusters):
            spread_logs[cluster] = logs_of_brains[tables.spread[head, cluster]]
        shares = _share_clusters(tables, query, head, counts, logits, logs, takes_max, sums.peak)
        chosen = _choose(shares, counts, wanted)
        num_blocks, runs = find_runs(counts, sizes, chosen, blocks)
        own_blocks = blocks[:num_blocks]
        for _ in range(_MAX_ROUNDS):
            highest = scan_blocks(
                tables, query, head, num_bits, noise, logits, own_blocks, runs, spread_logs,
                hoped, sums,
            )  # fmt: skip
            _include_others(highest, logits, runs.left, sums.peak)
            if np.all(highest >= _LOWEST) and np.all(highest <= _HIGHEST):
                break
            sums.peak[:] += highest
        _add_others(tables, head, logits, runs.left, sums)
        slots, ranks, found.num_scanned[head] = _choose_tokens(
            hoped, runs, num_clusters, sums, found.places.shape[1], takes_max
        )
        whole = sums.total.copy()
        _take_out_hits(
            tables, query, head, sizes, F32(noise), spread_logs, hoped, own_blocks, runs, slots,
            ranks, sums, found,
        )  # fmt: skip
        if len(slots) == counts.sum():
            sums.total[:] = 0.0  # exactly
        _write_rest(tables, head, whole, sums, found)


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _score_clusters(tables: Tables, query: Query, head: int, logits: NDArray[np.float32]) -> None:
    """Set the logit of every centroid, and ``-inf`` for what is none."""
    centroids, scales = tables.centroids[head], tables.centroid_scale[head]
    num_clusters, dim = logits.shape[1] - 1, centroids.shape[1]
    queries, num_queries, step = query.wide[head], len(logits), query.wide.shape[2]
    products = np.empty(num_queries, np.int32)
    padded, remainder = np.zeros(step, np.int8), dim % 32
    for cluster in range(num_clusters):
        row = centroids.ctypes.data + cluster * dim
        if remainder:
            padded[:dim] = centroids[cluster]
            row = padded.ctypes.data
        q = 0
        while q < num_queries:
            first, target = queries.ctypes.data + 2 * q * step, products.ctypes.data + 4 * q
            if q + 4 <= num_queries:
                row_dots_4(row, first, step, step // 32, target)
                q += 4
            else:
                row_dots_1(row, first, step, step // 32, target)
                q += 1
        scale = from_brain(scales[cluster])
        for q in range(num_queries):
            logits[q, cluster] = F32(products[q]) * scale * query.wide_unit[head, q]
    for q in range(num_queries):
        logits[q, num_clusters] = F32(-np.inf)


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _share_clusters(
    tables: Tables,
    query: Query,
    head: int,
    counts: NDArray[np.int16],
    logits: NDArray[np.float32],
    logs: NDArray[np.float32],
    takes_max: bool,
    peak: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return the log share that keys of each cluster may have; set ``peak`` to the highest mean."""
    num_clusters = len(counts)
    deviation = F32(DEVIATIONS / math.sqrt(tables.centroids.shape[2]))
    share, hoped = np.full(num_clusters, F32(-np.inf)), np.empty(num_clusters, np.float32)
    for q in range(len(peak)):
        top, reach = F32(-np.inf), F32(-np.inf)
        for c in range(num_clusters):
            hoped[c] = F32(-np.inf)
            if counts[c] > 0:
                radius = from_brain(tables.radius[head, c])
                bound = logits[q, c] + deviation * radius * query.norm[head, q]
                hoped[c] = bound + logs[counts[c]]
                reach, top = max(reach, logits[q, c]), max(top, hoped[c])
        total = F32(0)
        for c in range(num_clusters):
            total += exp(hoped[c] - top)
        peak[q] = reach
        _combine(share, hoped, top + F32(math.log(total)), takes_max or q == 0)
    return share


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _combine(
    share: NDArray[np.float32], hoped: NDArray[np.float32], lse: np.float32, takes_max: bool
) -> None:
    """Combine the log shares that one more query gives with those of the others."""
    if takes_max:
        for i in range(len(share)):
            share[i] = max(share[i], hoped[i] - lse)
        return
    for i in range(len(share)):
        larger, smaller = max(share[i], hoped[i] - lse), min(share[i], hoped[i] - lse)
        if larger > F32(-np.inf):
            share[i] = larger + F32(math.log1p(exp(smaller - larger)))


@njit(nogil=True, cache=True)
def _choose(
    share: NDArray[np.float32], counts: NDArray[np.int16], wanted: int
) -> NDArray[np.uint8]:
    """Return which clusters have the largest shares, so many that they hold the tokens wanted."""
    keys = np.empty(len(share), np.uint32)
    for c in range(len(share)):
        keys[c] = ordered(share[c])
    key, remaining = cut_at(keys, counts, wanted)
    chosen = np.zeros(len(share), np.uint8)
    for c in range(len(share)):
        if keys[c] > key:
            chosen[c] = 1
        elif keys[c] == key and remaining > 0:
            chosen[c] = 1
            remaining -= counts[c]
    return chosen


@njit(nogil=True, cache=True)
def _include_others(
    highest: NDArray[np.float32],
    logits: NDArray[np.float32],
    left: NDArray[np.int32],
    peak: NDArray[np.float32],
) -> None:
    """Raise the highest logits to those of clusters that are not scanned."""
    for q in range(len(highest)):
        for c in range(len(left)):
            if left[c] > 0:
                highest[q] = max(highest[q], logits[q, c] - peak[q])


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _add_others(
    tables: Tables, head: int, logits: NDArray[np.float32], left: NDArray[np.int32], sums: Sums
) -> None:
    """Add what was not scanned, as copies of the means of its clusters."""
    for q in range(len(logits)):
        total, squares = F32(0), F32(0)
        for c in range(len(left)):
            number = F32(left[c])
            one = exp(logits[q, c] - sums.peak[q]) if left[c] > 0 else F32(0)
            spread = from_brain(tables.spread[head, c])
            sums.mass[q, c] += one * number
            total += one * number
            squares += one * one * spread * spread * number
        sums.total[q] += total
        sums.squares[q] += squares


@njit(nogil=True, cache=True)
def _choose_tokens(
    hoped: NDArray[np.float32],
    runs: Runs,
    num_clusters: int,
    sums: Sums,
    budget: int,
    takes_max: bool,
) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """Return the scanned places with the best tokens, their ranks, and how many hold tokens."""
    num_queries, num_slots = len(hoped), runs.starts[-1]
    score = np.full(num_slots, F32(-np.inf))
    for q in range(num_queries):
        lse = sums.peak[q] + F32(math.log(sums.total[q]))
        _combine(score, hoped[q, :num_slots], lse, takes_max or q == 0)
    num_tokens = num_slots
    for run in range(len(runs.clusters)):
        if runs.clusters[run] == num_clusters:
            num_tokens -= runs.starts[run + 1] - runs.starts[run]
    slots, ranks = best(score, min(budget, num_tokens))
    return slots, ranks, num_tokens


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _take_out_hits(
    tables: Tables,
    query: Query,
    head: int,
    sizes: NDArray[np.int64],
    noise: np.float32,
    spread_logs: NDArray[np.float32],
    hoped: NDArray[np.float32],
    blocks: NDArray[np.int32],
    runs: Runs,
    slots: NDArray[np.int32],
    ranks: NDArray[np.int32],
    sums: Sums,
    found: Found,
) -> None:
    """Write where the hits are and their logits, and take them out of the sums."""
    places, clusters, logits = found.places[head], found.clusters[head], found.logits[head]
    places[len(slots) :], clusters[len(slots) :] = -1, 0
    logits[:, len(slots) :] = F32(-np.inf)
    scales, value_scales = tables.key_scale[head], tables.value_scale[head]
    signs, run = np.empty(32, np.float32), 0
    segment, stop = 0, (sizes[0, 0] + 15) // 16 * 16
    for i in range(len(slots)):
        slot, hit = slots[i], ranks[i]
        while runs.starts[run + 1] <= slot:
            run += 1
        place, cluster = np.int64(blocks[slot // 16]) * 16 + slot % 16, runs.clusters[run]
        places[hit], clusters[hit] = place, cluster
        spread = from_brain(tables.spread[head, cluster])
        scale, value_scale = abs(from_brain(scales[place])), from_brain(value_scales[place])
        _unpack_signs(tables.value_bits[head, place // 16], place % 16, signs)
        while stop <= place:
            segment += 1
            stop += (sizes[segment, 0] + 15) // 16 * 16
        for q in range(len(sums.peak)):
            deviation = noise * query.norm[head, q] * scale
            logit = hoped[q, slot] - spread_logs[cluster] - F32(2) * deviation
            logit -= F32(0.25) * deviation * deviation
            weight = exp(logit - sums.peak[q])
            logits[q, hit] = logit
            sums.total[q] -= weight
            sums.squares[q] -= weight * weight * spread * spread
            sums.mass[q, cluster] -= weight
            along, scaled = sums.along[q, segment], weight * value_scale
            for d in range(32):
                along[d] -= scaled * signs[d]


@njit(nogil=True, cache=True)
def _unpack_signs(bits: NDArray[np.uint8], lane: int, signs: NDArray[np.float32]) -> None:
    """Set the signs of one vector of a block."""
    column, plane = lane % 4, np.uint8(2 * (lane // 4))
    for d in range(16):
        packed = bits[d, column] >> plane
        signs[d] = F32(2 * np.int32(packed & 1) - 1)
        signs[16 + d] = F32(np.int32(packed & 2) - 1)


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _write_rest(
    tables: Tables, head: int, whole: NDArray[np.float64], sums: Sums, found: Found
) -> None:
    """Write attention to all that is no hit."""
    out = found.rest_out[head]
    out[:] = F32(0)
    _add_means(tables.value_means[head], tables.value_mean_scale[head], sums.mass, out)
    for segment in range(sums.along.shape[1]):
        for direction in range(32):
            row = tables.basis[head, segment, direction]
            for q in range(len(out)):
                weight, own = sums.along[q, segment, direction], out[q]
                for d in range(len(own)):
                    own[d] += weight * from_half(row[d])
    for q in range(len(out)):
        found.squares[head, q] = max(sums.squares[q], 0.0) / (whole[q] * whole[q])
        if sums.total[q] > 1e-6 * whole[q]:
            found.rest_lse[head, q] = sums.peak[q] + F32(math.log(sums.total[q]))
            out[q] /= F32(sums.total[q])
        else:  # sums of floats cannot tell it from nothing
            found.rest_lse[head, q] = F32(-np.inf)
            out[q] = F32(0)


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _add_means(
    means: NDArray[np.int8],
    scales: NDArray[np.uint16],
    mass: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Add the means of values, weighted."""
    row = np.empty(means.shape[1], np.float32)
    for c in range(mass.shape[1] - 1):
        scale, narrow = from_brain(scales[c]), means[c]
        for d in range(len(row)):
            row[d] = scale * F32(narrow[d])
        for q in range(len(out)):
            weight, own = mass[q, c], out[q]
            for d in range(len(row)):
                own[d] += weight * row[d]
