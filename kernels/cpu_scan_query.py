"""Queries rotated and rounded for the scan. Needs numba."""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels.cpu_scan_tables import FLOATS, Query

F32 = np.float32


@njit(nogil=True, cache=True, fastmath=FLOATS)
def round_queries(
    queries: NDArray[np.float32],
    turn: NDArray[np.float32],
    wide_limit: int,
    middle: float,
    out: Query,
) -> None:
    """Set all of ``out``, whose filling is zero already.

    Parameters
    ----------
    queries : float32 [num_heads, num_queries, key_dim]
    turn : float32 [key_dim, key_dim]
        The rotation.
    wide_limit : int
        The largest number that 16 bits are used for.
    middle : float
        Of the levels of codes.
    out : Query
    """
    num_heads, num_queries, dim = queries.shape
    turned = np.empty(dim, np.float32)
    for head in range(num_heads):
        for q in range(num_queries):
            query = queries[head, q]
            turned[:] = F32(0)
            square = F32(0)
            for i in range(dim):
                row, number = turn[i], query[i]
                square += number * number
                for d in range(dim):
                    turned[d] += number * row[d]
            wide_unit = max(_largest(query), F32(1e-30)) / F32(wide_limit)
            unit = max(_largest(turned), F32(1e-30)) / F32(127.0)
            total = F32(0)
            for d in range(dim):
                out.wide[head, q, d] = np.int32(np.rint(query[d] / wide_unit))
                level = np.rint(turned[d] / unit)
                out.bytes_[head, d // 4, q, d % 4] = np.int32(level)
                total += level
            out.wide_unit[head, q], out.unit[head, q] = wide_unit, unit
            out.middle[head, q] = total * unit * F32(middle)
            out.norm[head, q] = math.sqrt(square)


@njit(inline="always")
def _largest(row: NDArray[np.float32]) -> np.float32:
    largest = F32(0)
    for d in range(len(row)):
        largest = max(largest, abs(row[d]))
    return largest
