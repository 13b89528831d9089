"""Attention over units of codes, which are unpacked one at a time and never leave the cache.

Needs numba.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels import cpu_codec_fp8, cpu_codec_int8, cpu_codec_kivi
from offload.kernels.cpu_products import FLOAT
from offload.kernels.cpu_rows_heads import add_rows, rescale, score_rows

F32 = np.float32

INT8, FP8, KIVI4, KIVI2 = 2, 3, 4, 5
"""Codecs, by their numbers in records."""


@njit(nogil=True, cache=True)
def attend_units(
    first_head: int,
    step: int,
    query: NDArray[np.float32],
    slab: NDArray[np.uint8],
    places: NDArray[np.int64],
    unit_bytes: int,
    num_tokens: int,
    codec: int,
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
    is_done: NDArray[np.bool_],
) -> None:
    """Attend for heads ``first_head``, ``first_head + step`` and so on.

    Parameters
    ----------
    query : float32 [num_heads, num_queries, key_dim]
        Scaled; dimensions are multiples of 16.
    slab : uint8 [num_bytes]
    places : int64 [num_heads, num_units]
        Where units begin in it.
    unit_bytes, num_tokens, codec : int
        Of every unit.
    out, lse : float32 [num_heads, num_queries, value_dim], [num_heads, num_queries]
        Set.
    is_done : bool [num_heads]
        Set; False: one of the units is not for kernels (see ``tiers.codec_batch``).
    """
    num_heads, num_queries, key_dim = query.shape
    dim = key_dim + out.shape[2]
    wide = np.empty((num_tokens, dim), np.float32)
    rows = np.int64(wide.ctypes.data) + 4 * dim * np.arange(num_tokens)
    weights = np.empty((num_queries, num_tokens), np.float32)
    peak, total = np.empty(num_queries, np.float32), np.empty(num_queries, np.float32)
    for head in range(first_head, num_heads, step):
        own, asked = out[head], query[head]
        own[:], peak[:], total[:] = F32(0), F32(-np.inf), F32(0)
        is_done[head] = True
        for number in range(places.shape[1]):
            start = places[head, number]
            if not _unpack(slab[start : start + unit_bytes], codec, key_dim, wide):
                is_done[head] = False
                break
            score_rows(asked, rows, 4 * dim, FLOAT, weights)
            for q in range(num_queries):
                rescale(weights[q], peak, total, q, own[q])
            add_rows(weights, rows, 4 * key_dim, FLOAT, own)
        for q in range(num_queries):
            lse[head, q] = peak[q] + F32(math.log(total[q])) if total[q] > 0 else F32(-np.inf)
            if total[q] > 0:
                own[q] /= total[q]


@njit(nogil=True, cache=True)
def _unpack(
    payload: NDArray[np.uint8], codec: int, key_dim: int, wide: NDArray[np.float32]
) -> np.bool_:
    if codec == INT8:
        return cpu_codec_int8.unpack(payload, key_dim, wide)
    if codec == FP8:
        return cpu_codec_fp8.unpack(payload, key_dim, wide)
    return cpu_codec_kivi.unpack(4 if codec == KIVI4 else 2, payload, key_dim, wide)
