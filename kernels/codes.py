"""Codes of one or two bits per dimension for directions, and inner products with them.

A vector is rotated at random, each coordinate of its direction is rounded to one of two or four
levels a step apart, and the length is scaled so that inner products with the coded direction are
unbiased (RaBitQ, Gao and Long 2024, section 3; the scale is ``|r| / <code, direction>``).
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_EDGE = {1: (), 2: (0.9957,)}
"""Where a standard normal coordinate is cut besides at zero: equal steps, which miss 0.1188 of the
variance where the best four levels (Lloyd-Max) miss 0.1175, and make a level a small integer."""

BLOCK_PLACES = 16
"""Vectors whose codes lie together, so that one instruction handles as many of them."""

_MIN_COSINE = 0.05


class Codes(NamedTuple):
    """Coded vectors, in blocks of 16; the last block may be part empty, with a scale of zero.

    Attributes
    ----------
    bits : Tensor, uint8 [num_heads, num_blocks, num_words, 16, 4]
        A word of four bytes of every vector of a block, then the next word. Bits ``k * num_bits``
        and up of byte ``i`` of word ``j`` number the level of dimension
        ``(j * 8 / num_bits + k) * 4 + i``.
    scale : Tensor, bfloat16 [num_heads, 16 * num_blocks]
        Times the inner product with the levels, it estimates the inner product with the vector.
    """

    bits: Tensor
    scale: Tensor


@functools.cache
def rotation(dim: int, seed: int = 0) -> Tensor:
    """Return a random orthogonal matrix ``[dim, dim]``, float32 on the CPU; always the same.

    Codes outlive a process, so it must not depend on the machine or on a library's version: the
    bits of PCG64 are fixed by numpy's policy, the rest is arithmetic in float64.
    """
    bits = np.random.PCG64(seed).random_raw(2 * dim * dim) >> np.uint64(11)
    uniform = (bits + 0.5) / 2.0**53
    radius = np.sqrt(-2 * np.log(uniform[: dim * dim]))
    normal = radius * np.cos(2 * math.pi * uniform[dim * dim :])
    turned, triangle = np.linalg.qr(normal.reshape(dim, dim))
    return torch.from_numpy((turned * np.sign(np.diag(triangle))).astype(np.float32))


def encode(rotated: Tensor, num_bits: int, *, unbiased: bool) -> Codes:
    """Code vectors that were rotated.

    Parameters
    ----------
    rotated : Tensor, shape (num_heads, num_vectors, dim), float32
    num_bits : {1, 2}
    unbiased : bool
        Scale for unbiased inner products (keys); else for the least squared error (values).

    Returns
    -------
    Codes
    """
    numbers, scale = quantise(rotated, num_bits, unbiased=unbiased)
    return Codes(pack(numbers, num_bits), pad(scale, (0, -scale.shape[1] % BLOCK_PLACES)))


def quantise(rotated: Tensor, num_bits: int, *, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Return the number of each coordinate's level, uint8, and the scales; see ``encode``."""
    dim = rotated.shape[-1]
    length = rotated.norm(dim=-1)
    unit = (length / math.sqrt(dim)).unsqueeze(-1)
    # A few comparisons are much faster than a search (``bucketize``).
    numbers = (rotated > 0).to(torch.uint8)
    for edge in _EDGE[num_bits]:
        numbers += rotated > edge * unit
        numbers += rotated > -edge * unit
    levels = numbers - middle(num_bits)
    along = (levels * rotated).sum(-1)
    if unbiased:
        cosine = along / (levels.norm(dim=-1) * length).clamp_min(1e-30)
        scale = torch.where(cosine > _MIN_COSINE, length.square() / along.clamp_min(1e-30), 0.0)
    else:
        scale = along / levels.square().sum(-1)
    return numbers, scale.to(torch.bfloat16)


def inner_products(query: Tensor, codes: Codes, num_bits: int) -> Tensor:
    """Estimate the inner products of queries with coded vectors.

    Parameters
    ----------
    query : Tensor, shape (num_heads, num_queries, dim), float32
        Rotated as the vectors were.
    codes : Codes

    Returns
    -------
    Tensor, shape (num_heads, num_queries, 16 * num_blocks)
    """
    levels = unpack(codes.bits, num_bits, query.shape[-1])
    return torch.bmm(query, levels.mT) * codes.scale.float().unsqueeze(1)


def decode(codes: Codes, num_bits: int, dim: int) -> Tensor:
    """Return the vectors that codes stand for, ``[num_heads, 16 * num_blocks, dim]``, rotated."""
    return unpack(codes.bits, num_bits, dim) * codes.scale.float().unsqueeze(-1)


def pack(numbers: Tensor, num_bits: int) -> Tensor:
    """Return numbers of levels as ``Codes.bits``.

    Parameters
    ----------
    numbers : Tensor, uint8 [num_heads, num_vectors, dim]
    num_bits : {1, 2}
    """
    per_byte = 8 // num_bits
    filling = (0, -numbers.shape[-1] % (4 * per_byte), 0, -numbers.shape[1] % BLOCK_PLACES)
    rows = pad(numbers, filling).unflatten(2, (-1, per_byte, 4))
    packed = rows[:, :, :, 0].clone()
    for place in range(1, per_byte):
        packed |= rows[:, :, :, place] << place * num_bits
    blocks: Tensor = packed.unflatten(1, (-1, BLOCK_PLACES)).transpose(2, 3).contiguous()
    return blocks


def unpack(bits: Tensor, num_bits: int, dim: int) -> Tensor:
    """Return the levels of packed codes, float32 ``[num_heads, 16 * num_blocks, dim]``."""
    shifts = torch.arange(0, 8, num_bits, device=bits.device).to(torch.uint8).unsqueeze(-1)
    rows = bits.transpose(2, 3).flatten(1, 2).unsqueeze(3) >> shifts & (1 << num_bits) - 1
    levels: Tensor = rows.flatten(2)[..., :dim] - middle(num_bits)
    return levels


def middle(num_bits: int) -> float:
    """Return what a number exceeds its level by: levels lie around zero, one apart."""
    return ((1 << num_bits) - 1) / 2


def noise(num_bits: int, dim: int) -> float:
    """Return the standard deviation of an estimated inner product, per unit of both lengths.

    Of the estimate for a vector of length ``scale * |levels|``; a coded direction has the cosine
    ``c`` with the true one, and what is missing is spread over the other dimensions (RaBitQ,
    theorem 3.2, with its bound replaced by the deviation).
    """
    cosine = {1: 0.7979, 2: 0.9387}[num_bits]
    return math.sqrt(1 - cosine**2) / math.sqrt(max(1, dim - 1))


def level_norm(num_bits: int, dim: int) -> float:
    """Return the usual length of the levels of one vector."""
    return math.sqrt(dim) * {1: 0.5, 2: 0.9428}[num_bits]
