"""Attention over rows of keys and values that lie anywhere in memory. Needs numba."""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels import cpu_products as products
from offload.kernels.cpu_intrinsics import exp, load_u8, prefetch
from offload.kernels.cpu_products import BRAIN, FLOAT
from offload.kernels.cpu_scan_tables import FLOATS

F32 = np.float32

_BLOCK_ROWS = 64
"""Rows whose softmax is computed together."""

_AHEAD = 6
"""Rows between the one that is worked on and the one that is being loaded."""


@njit(nogil=True, cache=True, fastmath=FLOATS)
def attend_heads(
    first_head: int,
    step: int,
    query: NDArray[np.float32],
    addresses: NDArray[np.int64],
    rows_per_address: int,
    kind: int,
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
) -> None:
    """Attend for heads ``first_head``, ``first_head + step`` and so on.

    Parameters
    ----------
    query : float32 [num_heads, num_queries, key_dim]
        Scaled; dimensions are multiples of 16.
    addresses : int64 [num_heads, num_addresses]
        Of the first of ``rows_per_address`` rows that follow each other, keys then values; 0: none.
    rows_per_address : int
    kind : int
        Code of the dtype.
    out, lse : float32 [num_heads, num_queries, value_dim], [num_heads, num_queries]
        Set.
    """
    num_heads, num_queries, key_dim = query.shape
    value_dim = out.shape[2]
    item = 4 if kind == FLOAT else 2
    row_bytes = (key_dim + value_dim) * item
    rows = np.empty(_BLOCK_ROWS, np.int64)
    weights = np.empty((num_queries, _BLOCK_ROWS), np.float32)
    peak, total = np.empty(num_queries, np.float32), np.empty(num_queries, np.float32)
    for head in range(first_head, num_heads, step):
        own, asked = out[head], query[head]
        own[:], peak[:], total[:] = F32(0), F32(-np.inf), F32(0)
        place, inside, count = 0, 0, 0
        num_addresses = addresses.shape[1]
        while place < num_addresses:
            count = 0
            while place < num_addresses and count < _BLOCK_ROWS:
                if addresses[head, place] == 0:
                    place += 1
                    continue
                rows[count] = addresses[head, place] + inside * row_bytes
                count += 1
                inside += 1
                if inside == rows_per_address:
                    place, inside = place + 1, 0
            if count == 0:
                break
            score_rows(asked, rows[:count], row_bytes, kind, weights)
            for q in range(num_queries):
                rescale(weights[q, :count], peak, total, q, own[q])
            add_rows(weights, rows[:count], key_dim * item, kind, own)
        for q in range(num_queries):
            lse[head, q] = peak[q] + F32(math.log(total[q])) if total[q] > 0 else F32(-np.inf)
            if total[q] > 0:
                own[q] /= total[q]


@njit(nogil=True, cache=True)
def score_rows(
    query: NDArray[np.float32],
    rows: NDArray[np.int64],
    row_bytes: int,
    kind: int,
    logits: NDArray[np.float32],
) -> None:
    """Set the logits of rows, for four queries at a time while there are four."""
    num_queries, step = query.shape
    num_steps, out_step = step // 16, logits.shape[1]
    for i in range(len(rows)):
        if i + _AHEAD < len(rows):
            for offset in range(0, row_bytes, 64):
                prefetch(rows[i + _AHEAD] + offset)
        q = 0
        while q < num_queries:
            asked, row = query.ctypes.data + 4 * q * step, rows[i]
            out = logits.ctypes.data + 4 * (q * out_step + i)
            if q + 4 <= num_queries:
                if kind == BRAIN:
                    products.brain_scores_4(row, asked, step, num_steps, out, out_step)
                elif kind == FLOAT:
                    products.float_scores_4(row, asked, step, num_steps, out, out_step)
                else:
                    products.half_scores_4(row, asked, step, num_steps, out, out_step)
                q += 4
            else:
                if kind == BRAIN:
                    products.brain_scores_1(row, asked, step, num_steps, out, out_step)
                elif kind == FLOAT:
                    products.float_scores_1(row, asked, step, num_steps, out, out_step)
                else:
                    products.half_scores_1(row, asked, step, num_steps, out, out_step)
                q += 1


@njit(nogil=True, cache=True, fastmath=FLOATS)
def rescale(
    logits: NDArray[np.float32],
    peak: NDArray[np.float32],
    total: NDArray[np.float32],
    q: int,
    out: NDArray[np.float32],
) -> None:
    """Turn logits into weights relative to the highest so far."""
    top = peak[q]
    for i in range(len(logits)):
        top = max(top, logits[i])
    if top > peak[q]:
        factor = exp(peak[q] - top) if peak[q] > F32(-np.inf) else F32(0)
        for d in range(len(out)):
            out[d] *= factor
        total[q] *= factor
        peak[q] = top
    own = F32(0)
    for i in range(len(logits)):
        logits[i] = exp(logits[i] - top)
        own += logits[i]
    total[q] += own


@njit(nogil=True, cache=True)
def add_rows(
    weights: NDArray[np.float32],
    rows: NDArray[np.int64],
    offset: int,
    kind: int,
    out: NDArray[np.float32],
) -> None:
    """Add the weighted values of rows."""
    num_queries, dim = out.shape
    first, count, step, num_steps = rows.ctypes.data, len(rows), weights.shape[1], dim // 16
    q = 0
    while q < num_queries:
        own, goal = weights.ctypes.data + 4 * q * step, out.ctypes.data + 4 * q * dim
        if q + 4 <= num_queries:
            if kind == BRAIN:
                products.brain_sums_4(first, count, offset, own, step, goal, dim, num_steps)
            elif kind == FLOAT:
                products.float_sums_4(first, count, offset, own, step, goal, dim, num_steps)
            else:
                products.half_sums_4(first, count, offset, own, step, goal, dim, num_steps)
            q += 4
        else:
            if kind == BRAIN:
                products.brain_sums_1(first, count, offset, own, step, goal, dim, num_steps)
            elif kind == FLOAT:
                products.float_sums_1(first, count, offset, own, step, goal, dim, num_steps)
            else:
                products.half_sums_1(first, count, offset, own, step, goal, dim, num_steps)
            q += 1


@njit(nogil=True, cache=True)
def copy_rows(first: int, step: int, addresses: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    """Copy rows ``first``, ``first + step`` and so on; zeros where the address is 0."""
    num_bytes = out.shape[1]
    for i in range(first, len(addresses), step):
        ahead = i + _AHEAD * step
        if ahead < len(addresses) and addresses[ahead] != 0:
            for offset in range(0, num_bytes, 64):
                prefetch(addresses[ahead] + offset)
        row = out[i]
        if addresses[i] == 0:
            row[:] = 0
            continue
        for offset in range(num_bytes):
            row[offset] = load_u8(addresses[i], offset)
