"""Bounds of the logits of boxes, from their middles and widths. Needs numba.

With ``s = lower + upper`` and ``w = upper - lower`` the bounds are ``(q . s ± |q| . w) / 2``: both
cost as much as one of them from the corners.
"""

from typing import Any

import numpy as np
from numba import njit
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from offload.kernels.cpu_intrinsics import pointer_to, prefetch, widen
from offload.kernels.cpu_scan_tables import FLOATS

F32 = np.float32

_AHEAD = 4
"""Boxes between the one that is worked on and the one that is being loaded."""


@njit(nogil=True, cache=True)
def score_level(
    query: NDArray[np.float32],
    boxes: NDArray[np.int64],
    like: NDArray[Any],
    head: int,
    nodes: NDArray[np.int32],
    above: NDArray[np.float32],
    below: NDArray[np.float32],
) -> None:
    """Set the bounds of some nodes of a head and level.

    Parameters
    ----------
    query : float32 [num_queries, key_dim]
    boxes : int64 [8]
        Of all heads: address of their lower and upper corners, [num_heads, num_all, key_dim];
        ``num_all``; address of scales and offsets, float32 [num_heads, num_blocks, key_dim];
        ``num_blocks``; address and length of ``block``, int32 [num_nodes].
    like : array
        Of the dtype of corners: bfloat16 as uint16 and float16 as int16, with the bits they have.
    head : int
    nodes, above, below
        See ``_score_nodes``.
    """
    dim = query.shape[1]
    rows, blocks = boxes[2], boxes[5]
    first = head * rows * dim * like.itemsize
    corners = (rows, dim)
    first_block = head * blocks * dim * 4
    codes = (blocks, dim)
    _score_nodes(
        query,
        carray(pointer_to(boxes[0] + first), corners, like.dtype),
        carray(pointer_to(boxes[1] + first), corners, like.dtype),
        carray(pointer_to(boxes[3] + first_block), codes, np.float32),
        carray(pointer_to(boxes[4] + first_block), codes, np.float32),
        carray(pointer_to(boxes[6]), (boxes[7],), np.int32),
        nodes,
        above,
        below,
    )


@njit(nogil=True, cache=True)
def _score_nodes(
    query: NDArray[np.float32],
    lower: NDArray[Any],
    upper: NDArray[Any],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    block: NDArray[np.int32],
    nodes: NDArray[np.int32],
    above: NDArray[np.float32],
    below: NDArray[np.float32],
) -> None:
    """Set the bounds of some nodes of a head.

    Parameters
    ----------
    query : float32 [num_queries, key_dim]
    lower, upper : [num_all, key_dim]
        Of the head.
    scale, offset : float32 [num_blocks, key_dim]
    block : int32 [num_all]
    nodes : int32 [num_nodes]
    above, below : float32 [num_queries, num_nodes]
    """
    num_queries, dim = query.shape
    is_coded, current = len(scale) > 0, -1
    asked = np.empty((num_queries, dim), np.float32) if is_coded else query
    base = np.zeros(num_queries, np.float32)
    sums = np.empty(8, np.float32)
    row_bytes = lower.itemsize * dim
    for place in range(len(nodes)):
        node = nodes[place]
        if is_coded and block[node] != current:
            current = block[node]
            _rescale(query, scale[current], offset[current], asked, base)
        if place + _AHEAD < len(nodes):
            ahead = nodes[place + _AHEAD] * row_bytes
            for byte in range(0, row_bytes, 64):
                prefetch(lower.ctypes.data + ahead + byte)
                prefetch(upper.ctypes.data + ahead + byte)
        q = 0
        while q + 4 <= num_queries:
            _bound_4(asked[q : q + 4], lower[node], upper[node], sums)
            for i in range(4):
                above[q + i, place] = base[q + i] + F32(0.5) * (sums[i] + sums[4 + i])
                below[q + i, place] = base[q + i] + F32(0.5) * (sums[i] - sums[4 + i])
            q += 4
        while q < num_queries:
            middle, width = _bound(asked[q], lower[node], upper[node])
            above[q, place] = base[q] + F32(0.5) * (middle + width)
            below[q, place] = base[q] + F32(0.5) * (middle - width)
            q += 1


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _rescale(
    query: NDArray[np.float32],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    asked: NDArray[np.float32],
    base: NDArray[np.float32],
) -> None:
    """Set queries for the codes of a block, and what its offset comes to."""
    for q in range(len(query)):
        total = F32(0)
        for d in range(len(scale)):
            asked[q, d] = query[q, d] * scale[d]
            total += query[q, d] * offset[d]
        base[q] = total


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _bound_4(
    query: NDArray[np.float32],
    lower: NDArray[Any],
    upper: NDArray[Any],
    sums: NDArray[np.float32],
) -> None:
    """Set the inner products of four queries with the sums, and then with the widths."""
    first, second, third, fourth = query[0], query[1], query[2], query[3]
    m0, m1, m2, m3 = F32(0), F32(0), F32(0), F32(0)
    w0, w1, w2, w3 = F32(0), F32(0), F32(0), F32(0)
    for d in range(len(lower)):
        low, high = widen(lower[d]), widen(upper[d])
        middle, width = high + low, high - low
        m0 += first[d] * middle
        m1 += second[d] * middle
        m2 += third[d] * middle
        m3 += fourth[d] * middle
        w0 += abs(first[d]) * width
        w1 += abs(second[d]) * width
        w2 += abs(third[d]) * width
        w3 += abs(fourth[d]) * width
    sums[0], sums[1], sums[2], sums[3] = m0, m1, m2, m3
    sums[4], sums[5], sums[6], sums[7] = w0, w1, w2, w3


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _bound(
    query: NDArray[np.float32], lower: NDArray[Any], upper: NDArray[Any]
) -> tuple[np.float32, np.float32]:
    middle, width = F32(0), F32(0)
    for d in range(len(lower)):
        low, high = widen(lower[d]), widen(upper[d])
        middle += query[d] * (high + low)
        width += abs(query[d]) * (high - low)
    return middle, width
