"""Decode attention over chunks where they lie: all of a view, or the named slots of a pool.

One program has the queries of one KV head (a whole GQA group) and a share of the keys; the shares
are merged afterwards. Bound by memory: each key and value is read once, whatever the group.
"""

import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.triton_launch import DTYPES
from offload.kernels.triton_paged import attend_paged
from offload.kernels.triton_steps import (
    find_chunks,
    fold,
    load_rows,
    normal_lse,
    places_of,
    store_rows,
)
from offload.types import Partial

MOST_ROWS = 64
"""Queries of one KV head, over all members of its group: their sums stay in registers."""

MOST_DIM = 256
"""Of a key or a value, for the same reason."""


@triton.jit
def _attend_chunks(
    query: tl.tensor,
    tables: tl.tensor,
    strides: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    sizes: tl.tensor,
    scale: tl.tensor,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> None:
    num_kv_heads, num_rows, num_keys, num_chunks, chunk_tokens, split_keys = sizes
    split, program = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = program // num_kv_heads, program % num_kv_heads
    row = program * num_rows + tl.arange(0, ROWS)
    has_row = tl.arange(0, ROWS) < num_rows
    queries = load_rows(query + row * KEY_DIM, has_row, KEY_DIM, KEY_PAD).to(PRODUCT)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    first = split * split_keys
    for start in tl.range(first, tl.minimum(first + split_keys, num_keys), BLOCK):
        key = start + tl.arange(0, BLOCK)
        has_key = key < num_keys
        own = slots + batch * num_chunks
        chunk, token = find_chunks(own, key, has_key, chunk_tokens, HAS_SLOTS)
        places = places_of(tables[0], strides[0], batch, head, chunk, token)
        key_rows = load_rows(places, has_key, KEY_DIM, KEY_PAD).to(PRODUCT)
        places = places_of(tables[1], strides[1], batch, head, chunk, token)
        value_rows = load_rows(places, has_key, VALUE_DIM, VALUE_PAD).to(PRODUCT)
        peak, total, sums = fold(queries, key_rows, value_rows, has_key, scale, peak, total, sums)
    found = row * tl.num_programs(0) + split
    store_rows(out, found, has_row, sums, total, VALUE_DIM, VALUE_PAD)
    tl.store(lse + found, normal_lse(peak, total), mask=has_row)


def supports(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether ``attend_chunks`` takes these; shapes as there."""
    num_rows = query.shape[1] // keys.shape[2] * query.shape[2]
    return (
        query.dtype in DTYPES
        and query.dtype == keys.dtype == values.dtype
        and num_rows <= MOST_ROWS
        and max(keys.shape[-1], values.shape[-1]) <= MOST_DIM
        and keys.stride(-1) == values.stride(-1) == 1
        and query.numel() * keys.numel() > 0
    )


def attend_chunks(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    slots: Tensor | None = None,
    num_keys: int | None = None,
) -> Partial:
    """Attend with all queries to all keys of some chunks; queued on the current stream.

    Parameters
    ----------
    query : Tensor, shape (batch, num_heads, num_queries, key_dim)
        float32, float16 or bfloat16; at most 64 queries for each KV head, group members included.
    keys : Tensor, shape (batch, num_chunks, num_kv_heads, chunk_tokens, key_dim)
    values : Tensor, shape (batch, num_chunks, num_kv_heads, chunk_tokens, value_dim)
        Views of any strides but the last, which is 1; dtype of the query. With ``slots``, a pool
        for all rows of the batch: ``[1, num_slots, ...]``.
    scale : float
        Multiplies the scores.
    slots : Tensor, int64 [batch, num_chunks], optional
        Which slots of the pool hold the chunks, in order.
    num_keys : int, optional
        Of each row of the batch, if the last chunk is not full.

    Returns
    -------
    Partial
    """
    tables = (keys, values)
    return attend_paged(
        _attend_chunks, query, tables, values.shape[-1], scale=scale, slots=slots, num_keys=num_keys
    )
