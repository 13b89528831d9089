"""Decode attention over chunks in 8 or 4 bits, widened to the dtype of the query on the way.

As ``triton_chunks``; the formats are those of ``kernels.quantised``. The scale of a row of 8 bits
is taken out of the products: of a key's into its score, of a value's into its weight.
"""

import triton
import triton.language as tl
from torch import Tensor

from offload.errors import ConfigError
from offload.kernels.quantised import GROUP_CHANNELS, Quantised
from offload.kernels.triton_chunks import MOST_DIM, MOST_ROWS
from offload.kernels.triton_launch import DTYPES
from offload.kernels.triton_paged import attend_paged
from offload.kernels.triton_steps import (
    find_chunks,
    hide,
    load_rows,
    normal_lse,
    places_of,
    store_rows,
    weigh,
)
from offload.types import Partial

_GROUP = tl.constexpr(GROUP_CHANNELS)
_TINY = tl.constexpr(1e-30)


@triton.jit
def _attend_bytes(
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
        rows = load_rows(places, has_key, KEY_DIM, KEY_PAD).to(PRODUCT)
        places = places_of(tables[1], strides[1], batch, head, chunk, token)
        unit = tl.load(places, mask=has_key, other=0.0).to(tl.float32) * scale
        scores = tl.dot(queries, tl.trans(rows), input_precision="ieee") * unit[None, :]
        weights, shrink, peak, total = weigh(hide(scores, has_key), peak, total)
        places = places_of(tables[2], strides[2], batch, head, chunk, token)
        rows = load_rows(places, has_key, VALUE_DIM, VALUE_PAD).to(PRODUCT)
        places = places_of(tables[3], strides[3], batch, head, chunk, token)
        unit = tl.load(places, mask=has_key, other=0.0).to(tl.float32)
        # Relative to the largest, or the scales of small values would vanish in float16.
        most = tl.maximum(tl.max(unit, 0), _TINY)
        weights *= (unit / most)[None, :]
        product = tl.dot(weights.to(PRODUCT), rows, input_precision="ieee")
        sums = sums * shrink[:, None] + product * most
    found = row * tl.num_programs(0) + split
    store_rows(out, found, has_row, sums, total, VALUE_DIM, VALUE_PAD)
    tl.store(lse + found, normal_lse(peak, total), mask=has_row)


@triton.jit
def _load_halves(
    numbers: tl.tensor,
    scales: tl.tensor,
    has_row: tl.tensor,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> tl.tensor:
    """Return the first and the second half of the channels of some rows of 4 bits."""
    packed = load_rows(numbers, has_row, DIM // 2, DIM // 2).to(tl.int32)
    low, high = (packed & 15) - 8, (packed >> 4) - 8
    group = tl.arange(0, DIM // 2 // _GROUP)
    mask = tl.broadcast_to(has_row[:, None], (BLOCK, DIM // 2 // _GROUP))
    units = tl.load(scales[:, None] + group[None, :], mask=mask, other=0.0)
    shape: tl.constexpr = (BLOCK, DIM // 2 // _GROUP, _GROUP)
    spread = tl.reshape(tl.broadcast_to(units[:, :, None], shape), (BLOCK, DIM // 2))
    first = low.to(tl.float32) * spread.to(tl.float32)
    units = tl.load(scales[:, None] + DIM // 2 // _GROUP + group[None, :], mask=mask, other=0.0)
    spread = tl.reshape(tl.broadcast_to(units[:, :, None], shape), (BLOCK, DIM // 2))
    second = high.to(tl.float32) * spread.to(tl.float32)
    return first.to(PRODUCT), second.to(PRODUCT)


@triton.jit
def _attend_nibbles(
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
    KEY_HALF: tl.constexpr = KEY_DIM // 2
    VALUE_HALF: tl.constexpr = VALUE_DIM // 2
    query += row * KEY_DIM
    queries_low = load_rows(query, has_row, KEY_HALF, KEY_HALF).to(PRODUCT)
    queries_high = load_rows(query + KEY_HALF, has_row, KEY_HALF, KEY_HALF).to(PRODUCT)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums_low = tl.zeros([ROWS, VALUE_HALF], tl.float32)
    sums_high = tl.zeros([ROWS, VALUE_HALF], tl.float32)
    first = split * split_keys
    for start in tl.range(first, tl.minimum(first + split_keys, num_keys), BLOCK):
        key = start + tl.arange(0, BLOCK)
        has_key = key < num_keys
        own = slots + batch * num_chunks
        chunk, token = find_chunks(own, key, has_key, chunk_tokens, HAS_SLOTS)
        places = places_of(tables[0], strides[0], batch, head, chunk, token)
        units = places_of(tables[1], strides[1], batch, head, chunk, token)
        low, high = _load_halves(places, units, has_key, KEY_DIM, BLOCK, PRODUCT)
        scores = tl.dot(queries_low, tl.trans(low), input_precision="ieee")
        scores = tl.dot(queries_high, tl.trans(high), scores, input_precision="ieee") * scale
        weights, shrink, peak, total = weigh(hide(scores, has_key), peak, total)
        places = places_of(tables[2], strides[2], batch, head, chunk, token)
        units = places_of(tables[3], strides[3], batch, head, chunk, token)
        low, high = _load_halves(places, units, has_key, VALUE_DIM, BLOCK, PRODUCT)
        weights = weights.to(PRODUCT)
        sums_low = tl.dot(weights, low, sums_low * shrink[:, None], input_precision="ieee")
        sums_high = tl.dot(weights, high, sums_high * shrink[:, None], input_precision="ieee")
    found = row * tl.num_programs(0) + split
    # Rows of the output are two halves, each as wide as the stride of ``store_rows``.
    store_rows(out, found * 2, has_row, sums_low, total, VALUE_HALF, VALUE_HALF)
    store_rows(out, found * 2 + 1, has_row, sums_high, total, VALUE_HALF, VALUE_HALF)
    tl.store(lse + found, normal_lse(peak, total), mask=has_row)


def supports(query: Tensor, keys: Quantised, values: Quantised) -> bool:
    """Whether ``attend_quantised`` takes these; shapes as there."""
    num_rows = query.shape[1] // keys.numbers.shape[2] * query.shape[2]
    dims = (keys.dim, values.dim)
    return (
        query.dtype in DTYPES
        and keys.num_bits == values.num_bits
        and num_rows <= MOST_ROWS
        and max(dims) <= MOST_DIM
        and (keys.num_bits == 8 or all(dim in (64, 128, 256) for dim in dims))
        and query.numel() * keys.numbers.numel() > 0
    )


def attend_quantised(
    query: Tensor,
    keys: Quantised,
    values: Quantised,
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
    keys, values : Quantised, over (batch, num_chunks, num_kv_heads, chunk_tokens, dim)
        Both of 8 bits, or both of 4 bits and 64, 128 or 256 channels. Views of any strides but the
        last, which is 1. With ``slots``, a pool for all rows of the batch: ``[1, num_slots, ...]``.
    scale : float
        Multiplies the scores.
    slots : Tensor, int64 [batch, num_chunks], optional
        Which slots of the pool hold the chunks, in order.
    num_keys : int, optional
        Of each row of the batch, if the last chunk is not full.

    Returns
    -------
    Partial

    Raises
    ------
    ConfigError
        What ``supports`` does not accept.
    """
    if not supports(query, keys, values):
        raise ConfigError(
            f"no kernel for queries {tuple(query.shape)} of {query.dtype} over keys of "
            f"{keys.dim} channels in {keys.num_bits} bits, values of {values.dim} in "
            f"{values.num_bits}"
        )
    kernel = _attend_bytes if keys.num_bits == 8 else _attend_nibbles
    return attend_paged(
        kernel,
        query,
        (*keys, *values),
        values.dim,
        scale=scale,
        slots=slots,
        num_keys=num_keys,
    )
