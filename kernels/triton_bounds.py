"""The box that the keys of each chunk lie in, and what no logit of a chunk exceeds.

The definition: ``index.bounds`` (Quest, arXiv 2406.10774, section 3.2).
"""

import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.triton_launch import on_device, padded
from offload.kernels.triton_steps import load_rows

_BOX_WARPS = 2
"""A chunk of 16 keys is 4 KiB: 64 bytes under way in each of 64 threads."""

_TILE = 32
"""Boxes of one program: 16 KiB."""


@triton.jit
def _bound_chunks(
    keys: tl.tensor,
    lower: tl.tensor,
    upper: tl.tensor,
    num_keys: tl.tensor,
    chunk_tokens: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = tl.arange(0, TOKENS)
    key = chunk * chunk_tokens + token
    has_key = (token < chunk_tokens) & (key < num_keys)
    places = keys + head * head_stride + key.to(tl.int64) * token_stride
    rows = load_rows(places, has_key, DIM, PAD).to(tl.float32)
    least = tl.min(tl.where(has_key[:, None], rows, float("inf")), 0)
    most = tl.max(tl.where(has_key[:, None], rows, float("-inf")), 0)
    column = tl.arange(0, PAD)
    place = (head * tl.num_programs(0) + chunk) * DIM + column
    tl.store(lower + place, least, mask=column < DIM)
    tl.store(upper + place, most, mask=column < DIM)


@triton.jit
def _score_boxes(
    query: tl.tensor,
    lower: tl.tensor,
    upper: tl.tensor,
    out: tl.tensor,
    num_queries: tl.tensor,
    num_chunks: tl.tensor,
    head_stride: tl.tensor,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    head = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0) * TILE + tl.arange(0, TILE)
    has_chunk = chunk < num_chunks
    places = head * head_stride + chunk * DIM
    least = load_rows(lower + places, has_chunk, DIM, PAD).to(tl.float32)
    most = load_rows(upper + places, has_chunk, DIM, PAD).to(tl.float32)
    column = tl.arange(0, PAD)
    # Row by row instead of a matrix product: the queries of a group are few, and bounds stay exact.
    for row in tl.range(num_queries):
        own = head * num_queries + row
        element = tl.load(query + own * DIM + column, mask=column < DIM, other=0.0)
        worst = tl.where(element[None, :] > 0, most, least)
        tl.store(
            out + own * num_chunks + chunk, tl.sum(worst * element[None, :], 1), mask=has_chunk
        )


def bound_chunks(keys: Tensor, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest key of each chunk, channel by channel.

    Parameters
    ----------
    keys : Tensor, shape (num_heads, num_keys, key_dim)
        float32, float16 or bfloat16, finite; of any strides but the last, which is 1.
    chunk_tokens : int
        The last chunk may have fewer.

    Returns
    -------
    lower, upper : Tensor, shape (num_heads, num_chunks, key_dim)
        In the dtype of the keys, so that they bound them exactly.
    """
    num_heads, num_keys, dim = keys.shape
    num_chunks = triton.cdiv(num_keys, chunk_tokens)
    lower, upper = (keys.new_empty(num_heads, num_chunks, dim) for _ in range(2))
    with on_device(keys):
        _bound_chunks[(num_chunks, num_heads)](
            keys,
            lower,
            upper,
            num_keys,
            chunk_tokens,
            *keys.stride()[:2],
            DIM=dim,
            PAD=padded(dim),
            TOKENS=padded(chunk_tokens, 2),
            num_warps=_BOX_WARPS,
        )
    return lower, upper


def score_boxes(query: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Return what no logit of a chunk exceeds.

    Parameters
    ----------
    query : Tensor, shape (num_heads, num_queries, key_dim), float32
    lower, upper : Tensor, shape (num_heads, num_chunks, key_dim)
        Of the same strides; heads may lie apart.

    Returns
    -------
    Tensor, shape (num_heads, num_queries, num_chunks), float32
    """
    num_heads, num_queries, dim = query.shape
    num_chunks = lower.shape[1]
    out = query.new_empty(num_heads, num_queries, num_chunks)
    with on_device(query):
        _score_boxes[(triton.cdiv(num_chunks, _TILE), num_heads)](
            query.contiguous(),
            lower,
            upper,
            out,
            num_queries,
            num_chunks,
            lower.stride(0),
            DIM=dim,
            PAD=padded(dim),
            TILE=_TILE,
            num_warps=4,
        )
    return out
