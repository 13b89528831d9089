"""Weighted sums of values after a scan: coded residuals of places, and rows of tables.

The definition: ``kernels.scan``. Each sum belongs to one program, and parts are added in order, so
results do not depend on the order in which programs run. Weights are rounded to 11 bits where they
are multiplied, far less than what they are off by as estimates.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.codes import BLOCK_PLACES
from offload.kernels.scan import ScanTables
from offload.kernels.sign_planes import NUM_SIGNS
from offload.kernels.triton_launch import LEAST_DOT, on_device, padded, plan_splits
from offload.kernels.triton_sums import Places

_SEGMENT_SPLITS = 8
"""Programs that share a segment: 1,024 places each, of 8,192."""

_TILE_BLOCKS = 8


@triton.jit
def _sum_residuals(
    raw: tl.tensor,
    scanned: tl.tensor,
    key_scale: tl.tensor,
    value_bits: tl.tensor,
    value_scale: tl.tensor,
    noise: tl.tensor,
    lse: tl.tensor,
    firsts: tl.tensor,
    sums: tl.tensor,
    num_queries: tl.tensor,
    num_blocks: tl.tensor,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    segment, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    head = tl.program_id(1).to(tl.int64)
    row = head * num_queries + tl.arange(0, ROWS)
    has_row = tl.arange(0, ROWS) < num_queries
    unit = tl.load(noise + row, mask=has_row, other=0.0)
    level = tl.load(lse + row, mask=has_row, other=0.0)
    first, stop = tl.load(firsts + segment), tl.load(firsts + segment + 1)
    share = tl.cdiv(tl.cdiv(stop - first, SPLITS), BLOCKS) * BLOCKS
    first += split * share
    stop = tl.minimum(first + share, stop)
    lane, bit = tl.arange(0, 16), tl.arange(0, 32)
    # Two bits of a word belong to each token; its directions 0 to 15 and 16 to 31.
    shift = bit // 2 % 4 * 8 + bit // 8 * 2 + bit % 2
    total = tl.zeros([ROWS, 32], tl.float32)
    for start in tl.range(first, stop, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        has_block = tl.load(scanned + head * num_blocks + block, mask=block < stop, other=0) > 0
        seen = tl.broadcast_to(has_block[:, None], (BLOCKS, 16))
        is_seen = tl.reshape(seen, (BLOCKS * 16,))
        place = start * 16 + tl.arange(0, BLOCKS * 16)
        own = head * num_blocks * 16 + place
        at = raw + (row * num_blocks * 16)[:, None] + place[None, :]
        mask = has_row[:, None] & is_seen[None, :]
        logit = tl.load(at, mask=mask, other=float("-inf"))
        scale = tl.load(key_scale + own, mask=is_seen, other=0.0).to(tl.float32)
        deviation = unit[:, None] * scale[None, :]
        along = tl.load(value_scale + own, mask=is_seen, other=0.0).to(tl.float32)
        weights = tl.exp(logit - deviation * deviation / 4 - level[:, None]) * along[None, :]
        at = value_bits + (head * num_blocks + block)[:, None] * 16 + lane[None, :]
        packed = tl.load(at, mask=seen, other=0)
        signs = ((packed[:, None, :] >> shift[None, :, None]) & 1) * 2 - 1
        signs = tl.reshape(signs, (BLOCKS * 16, 32)).to(tl.float32)
        total = tl.dot(weights, signs, total, input_precision="tf32")
    found = (row * tl.num_programs(0) + tl.program_id(0))[:, None] * 32 + bit[None, :]
    tl.store(sums + found, total, mask=has_row[:, None])


@triton.jit
def _weigh_rows(
    weights: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    num_queries: tl.tensor,
    num_rows: tl.tensor,
    split_rows: tl.tensor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query, column = tl.arange(0, ROWS), tl.arange(0, PAD)
    has_query, has_column = query < num_queries, column < DIM
    total = tl.zeros([ROWS, PAD], tl.float32)
    first = split * split_rows
    for start in tl.range(first, tl.minimum(first + split_rows, num_rows), BLOCK):
        row = start + tl.arange(0, BLOCK)
        has_row = row < num_rows
        at = weights + (head * num_queries + query)[:, None] * num_rows + row[None, :]
        weight = tl.load(at, mask=has_query[:, None] & has_row[None, :], other=0.0)
        at = rows + (head * num_rows + row)[:, None] * DIM + column[None, :]
        value = tl.load(at, mask=has_row[:, None] & has_column[None, :], other=0)
        total = tl.dot(weight, value.to(tl.float32), total, input_precision="tf32")
    found = (head * num_queries + query) * tl.num_programs(0) + split
    mask = has_query[:, None] & has_column[None, :]
    tl.store(out + found[:, None] * DIM + column[None, :], total, mask=mask)


def sum_residuals(tables: ScanTables, places: Places, lse: Tensor, firsts: Tensor) -> Tensor:
    """Return the weighted sums of the coded residuals of values, along the directions of segments.

    Parameters
    ----------
    tables : ScanTables
    places : Places
    lse : Tensor, shape (num_heads, num_queries), float32
        That weights are relative to; finite.
    firsts : Tensor, int32 [num_segments + 1]
        First block of each segment, and the number of all blocks.

    Returns
    -------
    Tensor, shape (num_heads, num_queries, num_segments * 32), float32
    """
    num_heads, num_queries, num_places = places.raw.shape
    num_segments = len(tables.sizes)
    shape = (num_heads, num_queries, num_segments, _SEGMENT_SPLITS, NUM_SIGNS)
    sums = places.raw.new_empty(shape)
    with on_device(sums):
        _sum_residuals[(num_segments * _SEGMENT_SPLITS, num_heads)](
            places.raw,
            places.scanned,
            tables.key_scale,
            tables.value_bits.view(torch.int32),
            tables.value_scale,
            places.noise,
            lse,
            firsts,
            sums,
            num_queries,
            num_places // BLOCK_PLACES,
            ROWS=LEAST_DOT,
            BLOCKS=_TILE_BLOCKS,
            SPLITS=_SEGMENT_SPLITS,
            num_warps=4,
        )
    return sums.sum(3).flatten(2)


def weigh_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """Return weighted sums of rows.

    Parameters
    ----------
    weights : Tensor, shape (num_heads, num_queries, num_rows), float32, contiguous
        At most 16 queries for each head.
    rows : Tensor, shape (num_heads, num_rows, dim), int8 or float16, contiguous

    Returns
    -------
    Tensor, shape (num_heads, num_queries, dim), float32
    """
    num_heads, num_queries, num_rows = weights.shape
    dim = rows.shape[2]
    pad = padded(dim)
    # Both operands are unpacked to float32 in registers: twice a row, so that none spills.
    splits = plan_splits(weights.device, num_heads, num_rows, 2 * pad * torch.float32.itemsize)
    out = weights.new_empty(num_heads, num_queries, splits.num_splits, dim)
    with on_device(weights):
        _weigh_rows[(splits.num_splits, num_heads)](
            weights,
            rows,
            out,
            num_queries,
            num_rows,
            splits.split_keys,
            DIM=dim,
            ROWS=LEAST_DOT,
            PAD=pad,
            BLOCK=splits.block,
            num_warps=4,
        )
    return out.sum(2)
