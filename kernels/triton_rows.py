"""Decode attention over token rows that are named by address, wherever the device can read them.

A row is K then V of one token and head. It may lie in device memory or in page-locked host memory:
addresses are unified, so one pass reads what is in the cache and what is not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.triton_chunks import MOST_DIM, MOST_ROWS
from offload.kernels.triton_launch import DTYPES, on_device, padded, plan_splits, product_dtype
from offload.kernels.triton_merge import merge_splits, new_parts
from offload.kernels.triton_steps import LOG2_E, fold, load_rows, normal_lse, store_rows
from offload.types import Partial

ALIGNMENT = 16
"""Bytes that an address is a multiple of, so that a thread loads as many at once."""


@triton.jit
def _attend_rows(
    query: tl.tensor,
    addresses: tl.tensor,
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
    STORED: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> None:
    num_rows, num_hits, split_keys = sizes
    split, program = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = program * num_rows + tl.arange(0, ROWS)
    has_row = tl.arange(0, ROWS) < num_rows
    queries = load_rows(query + row * KEY_DIM, has_row, KEY_DIM, KEY_PAD).to(PRODUCT)
    addresses += program * num_hits
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    first = split * split_keys
    for start in tl.range(first, tl.minimum(first + split_keys, num_hits), BLOCK):
        hit = start + tl.arange(0, BLOCK)
        address = tl.load(addresses + hit, mask=hit < num_hits, other=0)
        has_key = address != 0
        places = tl.multiple_of(address.to(tl.pointer_type(STORED)), 16)
        key_rows = load_rows(places, has_key, KEY_DIM, KEY_PAD).to(PRODUCT)
        value_rows = load_rows(places + KEY_DIM, has_key, VALUE_DIM, VALUE_PAD).to(PRODUCT)
        peak, total, sums = fold(queries, key_rows, value_rows, has_key, scale, peak, total, sums)
    found = row * tl.num_programs(0) + split
    store_rows(out, found, has_row, sums, total, VALUE_DIM, VALUE_PAD)
    tl.store(lse + found, normal_lse(peak, total), mask=has_row)


def supports(query: Tensor, addresses: Tensor, value_dim: int) -> bool:
    """Whether ``attend_rows`` takes these; shapes as there."""
    num_rows = query.shape[1] // addresses.shape[1] * query.shape[2]
    return (
        query.dtype in DTYPES
        and num_rows <= MOST_ROWS
        and max(query.shape[-1], value_dim) <= MOST_DIM
        and query.shape[-1] * query.itemsize % ALIGNMENT == 0
        and query.numel() * addresses.numel() > 0
    )


def attend_rows(query: Tensor, addresses: Tensor, value_dim: int, *, scale: float) -> Partial:
    """Attend with all queries of a KV head to the rows that were found for it.

    Parameters
    ----------
    query : Tensor, shape (batch, num_heads, num_queries, key_dim)
        float32, float16 or bfloat16; at most 64 queries for each KV head, group members included.
    addresses : Tensor, int64 [batch, num_kv_heads, num_hits]
        Of the first byte of each row, a multiple of 16; 0 for none. A row is K then V in the dtype
        of the query, in memory that the device of the query can read: its own, or page-locked and
        registered with it. Nothing keeps the rows from being freed or changed meanwhile.
    value_dim : int
    scale : float
        Multiplies the scores.

    Returns
    -------
    Partial
        Queued on the current stream. Queries without a row have zero output and ``lse = -inf``.
    """
    batch, num_heads, num_queries, key_dim = query.shape
    num_kv_heads, num_hits = addresses.shape[1:]
    num_rows = num_heads // num_kv_heads * num_queries
    pads = padded(key_dim), padded(value_dim)
    row_bytes = sum(pads) * query.itemsize
    splits = plan_splits(query.device, batch * num_kv_heads, num_hits, row_bytes)
    out, lse = new_parts(query, value_dim, splits.num_splits)
    with on_device(query):
        _attend_rows[(splits.num_splits, batch * num_kv_heads)](
            query.contiguous(),
            addresses.contiguous(),
            out,
            lse,
            (num_rows, num_hits, splits.split_keys),
            scale * LOG2_E,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            ROWS=padded(num_rows),
            KEY_PAD=pads[0],
            VALUE_PAD=pads[1],
            BLOCK=splits.block,
            STORED=DTYPES[query.dtype],
            PRODUCT=product_dtype(query),
            num_warps=4,
            num_stages=6,  # two levels of loads share them: addresses, then rows
        )
    return merge_splits(out, lse)


def addresses_of(rows: Tensor) -> Tensor:
    """Return the address of every row of a tensor.

    Parameters
    ----------
    rows : Tensor, shape (..., row_dim)
        Of any strides but the last, which is 1.

    Returns
    -------
    Tensor, int64 [...], on the CPU
    """
    offsets = torch.zeros(rows.shape[:-1], dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(rows.shape[:-1], rows.stride()[:-1], strict=True)):
        shape = [1] * offsets.dim()
        shape[axis] = size
        offsets += (torch.arange(size) * stride * rows.itemsize).view(shape)
    return offsets + rows.data_ptr()
