"""Second pass of a scan: the estimated logit of every place in the blocks that were chosen.

The definition: ``kernels.scan``. A place is a token in the order of its cluster. Queries are
rounded to 8 bits, which is little beside the noise of the codes, so that products run on the matrix
units as they come out of the packing. Blocks that hold no key of a chosen cluster are not read.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.codes import BLOCK_PLACES, middle, rotation
from offload.kernels.scan import ScanTables
from offload.kernels.triton_clusters import LEAST_BYTE_DOT
from offload.kernels.triton_launch import LEAST_DOT, on_device, padded

_TILE_BLOCKS = 8
"""Blocks of one program: 128 places, whose levels take 16 KiB at 128 dimensions."""


@triton.jit
def _levels(
    key_bits: tl.tensor,
    block: tl.tensor,
    has_block: tl.tensor,
    num_words: tl.tensor,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tl.tensor:
    """Return the numbers of levels of all places of some blocks, int8 ``[places, dims]``."""
    word, lane = tl.arange(0, WORDS), tl.arange(0, 16)
    places = (block[:, None, None] * num_words + word[None, :, None]) * 16 + lane[None, None, :]
    mask = has_block[:, None, None] & (word < num_words)[None, :, None]
    packed = tl.load(key_bits + places, mask=mask & (lane >= 0)[None, None, :], other=0)
    packed = tl.reshape(tl.permute(packed, (0, 2, 1)), (BLOCKS * 16, WORDS))
    # Levels of four dimensions lie in the four bytes of a word, those of the next four above them.
    level = tl.arange(0, 32 // BITS)
    shift = level % 4 * 8 + level // 4 * BITS
    numbers = (packed[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(numbers.to(tl.int8), (BLOCKS * 16, WORDS * (32 // BITS)))


@triton.jit
def _score_places(
    turned: tl.tensor,
    logits: tl.tensor,
    chosen: tl.tensor,
    owner: tl.tensor,
    key_bits: tl.tensor,
    key_scale: tl.tensor,
    out: tl.tensor,
    scanned: tl.tensor,
    num_queries: tl.tensor,
    num_clusters: tl.tensor,
    num_blocks: tl.tensor,
    num_words: tl.tensor,
    center: tl.tensor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    place = tl.program_id(0) * BLOCKS * 16 + tl.arange(0, BLOCKS * 16)
    num_places = num_blocks * 16
    cluster = tl.load(owner + head * num_places + place, mask=place < num_places, other=-1)
    cluster = cluster.to(tl.int64)
    is_token = cluster >= 0
    touched = tl.load(chosen + head * num_clusters + cluster, mask=is_token, other=0).to(tl.int32)
    has_block = tl.max(tl.reshape(touched, (BLOCKS, 16)), 1) > 0
    levels = _levels(key_bits, head * num_blocks + block, has_block, num_words, BITS, WORDS, BLOCKS)
    row, column = tl.arange(0, ROWS), tl.arange(0, WORDS * (32 // BITS))
    has_row = row < num_queries
    places = turned + (head * num_queries + row)[:, None] * DIM + column[None, :]
    queries = tl.load(places, mask=has_row[:, None] & (column < DIM)[None, :], other=0.0)
    unit = tl.maximum(tl.max(tl.abs(queries), 1), 1e-30) / 127.0
    narrow = tl.floor(queries / unit[:, None] + 0.5)
    product = tl.dot(narrow.to(tl.int8), tl.trans(levels)).to(tl.float32)
    product = (product - (tl.sum(narrow, 1) * center)[:, None]) * unit[:, None]
    seen = tl.broadcast_to(has_block[:, None], (BLOCKS, 16))
    is_scanned = tl.reshape(seen, (BLOCKS * 16,)) & is_token
    scale = tl.load(key_scale + head * num_places + place, mask=is_scanned, other=0.0)
    mask = has_row[:, None] & is_scanned[None, :]
    rows = (head * num_queries + row)[:, None]
    of_cluster = tl.load(logits + rows * num_clusters + cluster[None, :], mask=mask, other=0.0)
    found = tl.where(
        is_scanned[None, :], of_cluster + product * scale.to(tl.float32), float("-inf")
    )
    mask = has_row[:, None] & tl.reshape(seen, (BLOCKS * 16,))[None, :]
    tl.store(out + rows * num_places + place[None, :], found, mask=mask)
    flags = scanned + head * num_blocks + block
    tl.store(flags, has_block.to(tl.int8), mask=block < num_blocks)


def score_places(
    tables: ScanTables, owner: Tensor, query: Tensor, logits: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the estimated logit of every place that is scanned, and which blocks are.

    Parameters
    ----------
    tables : ScanTables
    owner : Tensor, int16, int32 or int64 [num_heads, num_places], contiguous
        Cluster of each place; -1 for the filling at the end of a segment.
    query : Tensor, shape (num_heads, num_queries, key_dim), float32
        Scaled, not rotated; at most 16 for each head.
    logits : Tensor, shape (num_heads, num_queries, num_clusters), float32
        Of clusters, from ``score_clusters``.
    chosen : Tensor, int8 [num_heads, num_clusters]
        From ``choose_clusters``. Every block of 16 places with a key of one of them is scanned.

    Returns
    -------
    raw : Tensor, shape (num_heads, num_queries, num_places), float32
        ``-inf`` for filling. Blocks that are not scanned are not written.
    scanned : Tensor, int8 [num_heads, num_places / 16]
        1 for blocks that are scanned, else 0.
    """
    num_heads, num_queries, dim = query.shape
    num_places, num_words = owner.shape[1], tables.key_bits.shape[2]
    num_blocks = num_places // BLOCK_PLACES
    per_word = 32 // tables.num_bits
    out = query.new_empty(num_heads, num_queries, num_places)
    scanned = chosen.new_empty(num_heads, num_blocks)
    with on_device(query):
        _score_places[(triton.cdiv(num_blocks, _TILE_BLOCKS), num_heads)](
            query @ _rotation(dim, query.device),
            logits,
            chosen,
            owner,
            tables.key_bits.view(torch.int32),
            tables.key_scale,
            out,
            scanned,
            num_queries,
            tables.counts.shape[1],
            num_blocks,
            num_words,
            middle(tables.num_bits),
            DIM=dim,
            ROWS=LEAST_DOT,
            BITS=tables.num_bits,
            WORDS=padded(num_words, max(1, LEAST_BYTE_DOT // per_word)),
            BLOCKS=_TILE_BLOCKS,
            num_warps=4,
        )
    return out, scanned


@functools.cache
def _rotation(dim: int, device: torch.device) -> Tensor:
    """Return the rotation where it is needed: a copy to a device waits for the device."""
    return rotation(dim).to(device)
