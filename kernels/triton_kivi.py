"""Decode attention on keys and values in 4 or 2 bits; as ``triton_chunks``, of ``kernels.kivi``.

Codes are centred around zero, so that little cancels in products of 16 bits. A block of keys lies
within one group of tokens: its scales multiply the queries, and its zeros become one number per
query. Values are widened, since scales of tokens and of channel groups cannot be taken out at once.
"""

import triton
import triton.language as tl
from torch import Tensor

from offload.errors import ConfigError
from offload.kernels.kivi import GROUP, Bits, Kivi
from offload.kernels.triton_chunks import MOST_ROWS
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

_GROUP = tl.constexpr(GROUP)
_DIMS = (32, 64, 128, 256)


@triton.jit
def _load_codes(
    places: tl.tensor,
    has_row: tl.tensor,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return the centred codes of rows, float32 ``[BLOCK, DIM]``."""
    WIDTH: tl.constexpr = DIM * BITS // 8
    packed = load_rows(places, has_row, WIDTH, WIDTH).to(tl.int32)
    shifts = tl.arange(0, 8 // BITS) * BITS
    codes = (packed[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1)
    return (tl.reshape(codes, (BLOCK, DIM)) - (1 << BITS - 1)).to(tl.float32)


@triton.jit
def _spread(
    places: tl.tensor, has_row: tl.tensor, DIM: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Return for each channel what its group has, float32 ``[BLOCK, DIM]``."""
    groups = load_rows(places, has_row, DIM // _GROUP, DIM // _GROUP).to(tl.float32)
    wide = tl.broadcast_to(groups[:, :, None], (BLOCK, DIM // _GROUP, _GROUP))
    return tl.reshape(wide, (BLOCK, DIM))


@triton.jit
def _attend(
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
    BLOCK: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    PRODUCT: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    num_kv_heads, num_rows, num_keys, num_chunks, chunk_tokens, split_keys = sizes
    split, program = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = program // num_kv_heads, program % num_kv_heads
    row = program * num_rows + tl.arange(0, ROWS)
    has_row = tl.arange(0, ROWS) < num_rows
    queries = load_rows(query + row * KEY_DIM, has_row, KEY_DIM, KEY_DIM).to(tl.float32) * scale
    channel = tl.arange(0, KEY_DIM)
    CENTRE: tl.constexpr = 1 << BITS - 1
    STEP: tl.constexpr = BLOCK if BLOCK < _GROUP else _GROUP
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_DIM], tl.float32)
    own_slots = slots + batch * num_chunks
    first = split * split_keys
    for start in tl.range(first, tl.minimum(first + split_keys, num_keys), STEP):
        key = start + tl.arange(0, STEP)
        has_key = key < num_keys
        chunk, token = find_chunks(own_slots, start, start < num_keys, chunk_tokens, HAS_SLOTS)
        group = token // _GROUP
        units = places_of(tables[1], strides[1], batch, head, chunk, group) + channel
        zeros = places_of(tables[2], strides[2], batch, head, chunk, group) + channel
        unit = tl.load(units).to(tl.float32)
        zero = tl.load(zeros).to(tl.float32) + CENTRE * unit
        chunk, token = find_chunks(own_slots, key, has_key, chunk_tokens, HAS_SLOTS)
        places = places_of(tables[0], strides[0], batch, head, chunk, token)
        codes = _load_codes(places, has_key, BITS, KEY_DIM, STEP).to(PRODUCT)
        asked = (queries * unit[None, :]).to(PRODUCT)
        level = tl.sum(queries * zero[None, :], 1)
        scores = tl.dot(asked, tl.trans(codes), input_precision="ieee") + level[:, None]
        weights, shrink, peak, total = weigh(hide(scores, has_key), peak, total)
        places = places_of(tables[3], strides[3], batch, head, chunk, token)
        codes = _load_codes(places, has_key, BITS, VALUE_DIM, STEP)
        places = places_of(tables[4], strides[4], batch, head, chunk, token)
        spread = _spread(places, has_key, VALUE_DIM, STEP)
        places = places_of(tables[5], strides[5], batch, head, chunk, token)
        rows = (codes + CENTRE) * spread + _spread(places, has_key, VALUE_DIM, STEP)
        sums *= shrink[:, None]
        sums = tl.dot(weights.to(PRODUCT), rows.to(PRODUCT), sums, input_precision="ieee")
    found = row * tl.num_programs(0) + split
    store_rows(out, found, has_row, sums, total, VALUE_DIM, VALUE_DIM)
    tl.store(lse + found, normal_lse(peak, total), mask=has_row)


@triton.jit
def _attend_kivi4(
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
    _attend(
        query,
        tables,
        strides,
        slots,
        out,
        lse,
        sizes,
        scale,
        KEY_DIM,
        VALUE_DIM,
        ROWS,
        BLOCK,
        HAS_SLOTS,
        PRODUCT,
        4,
    )


@triton.jit
def _attend_kivi2(
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
    _attend(
        query,
        tables,
        strides,
        slots,
        out,
        lse,
        sizes,
        scale,
        KEY_DIM,
        VALUE_DIM,
        ROWS,
        BLOCK,
        HAS_SLOTS,
        PRODUCT,
        2,
    )


def supports(query: Tensor, keys: Kivi, values: Kivi, *, num_bits: Bits, value_dim: int) -> bool:
    """Whether ``attend_kivi`` takes these; shapes as there."""
    num_rows = query.shape[1] // keys.codes.shape[2] * query.shape[2]
    return (
        query.dtype in DTYPES
        and num_rows <= MOST_ROWS
        and query.shape[-1] in _DIMS
        and value_dim in _DIMS
        and keys.codes.shape[3] % GROUP == 0
        and query.numel() * keys.codes.numel() > 0
    )


def attend_kivi(
    query: Tensor,
    keys: Kivi,
    values: Kivi,
    *,
    num_bits: Bits,
    value_dim: int,
    scale: float,
    slots: Tensor | None = None,
    num_keys: int | None = None,
) -> Partial:
    """Attend with all queries to all keys of some chunks; queued on the current stream.

    Parameters
    ----------
    query : Tensor, shape (batch, num_heads, num_queries, key_dim)
        float32, float16 or bfloat16; at most 64 queries for each KV head, group members included.
    keys, values : Kivi, over (batch, num_chunks, num_kv_heads, chunk_tokens, dim)
        Of finite elements, with 32, 64, 128 or 256 channels; a chunk has a multiple of 32 tokens.
        Views of any strides but the last, which is 1: of payloads, as they are in memory. With
        ``slots``, a pool for all rows of the batch: ``[1, num_slots, ...]``.
    num_bits : {4, 2}
    value_dim : int
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
    if not supports(query, keys, values, num_bits=num_bits, value_dim=value_dim):
        raise ConfigError(
            f"no kernel for queries {tuple(query.shape)} of {query.dtype} over chunks of "
            f"{keys.codes.shape[3]} keys, values of {value_dim} channels, in {num_bits} bits"
        )
    return attend_paged(
        _attend_kivi4 if num_bits == 4 else _attend_kivi2,
        query,
        (*keys, *values),
        value_dim,
        scale=scale,
        slots=slots,
        num_keys=num_keys,
    )
