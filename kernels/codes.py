"""Codes of one or two bits per dimension for directions, and inner products with them.

A vector is rotated at random, each coordinate of its direction is rounded to one of two or four
levels, and the length is scaled so that inner products with the coded direction are unbiased
(RaBitQ, Gao and Long 2024, section 3; the scale is ``|r| / <code, direction>``).
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_EDGES = {1: (0.0,), 2: (-0.9816, 0.0, 0.9816)}
_LEVELS = {1: (-1.0, 1.0), 2: (-1.51, -0.4528, 0.4528, 1.51)}
"""Where a standard normal coordinate is cut, and what stands for each part (Lloyd-Max)."""

_MIN_COSINE = 0.05


class Codes(NamedTuple):
    """Coded vectors.

    Attributes
    ----------
    bits : Tensor, uint8 [..., num_bytes]
        Levels of the coordinates, the first in the lowest bits; the last byte may be part empty.
    scale : Tensor, bfloat16 [...]
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
    rotated : Tensor, shape (..., dim), float32
    num_bits : {1, 2}
    unbiased : bool
        Scale for unbiased inner products (keys); else for the least squared error (values).

    Returns
    -------
    Codes
    """
    dim = rotated.shape[-1]
    length = rotated.norm(dim=-1)
    unit = (length / math.sqrt(dim)).unsqueeze(-1)
    # A few comparisons are much faster than a search (``bucketize``).
    numbers = torch.zeros_like(rotated, dtype=torch.uint8)
    for edge in _EDGES[num_bits]:
        numbers += rotated > edge * unit
    levels = _look_up(torch.tensor(_LEVELS[num_bits], device=rotated.device), numbers)
    along = (levels * rotated).sum(-1)
    if unbiased:
        cosine = along / (levels.norm(dim=-1) * length).clamp_min(1e-30)
        scale = torch.where(cosine > _MIN_COSINE, length.square() / along.clamp_min(1e-30), 0.0)
    else:
        scale = along / levels.square().sum(-1)
    return Codes(_pack(numbers, num_bits), scale.to(torch.bfloat16))


def inner_products(query: Tensor, codes: Codes, num_bits: int) -> Tensor:
    """Estimate the inner products of queries with coded vectors.

    Parameters
    ----------
    query : Tensor, shape (num_heads, num_queries, dim), float32
        Rotated as the vectors were.
    codes : Codes
        ``bits`` [num_heads, num_vectors, num_bytes].

    Returns
    -------
    Tensor, shape (num_heads, num_queries, num_vectors)
    """
    levels = unpack(codes.bits, num_bits, query.shape[-1])
    return torch.bmm(query, levels.transpose(1, 2)) * codes.scale.float().unsqueeze(1)


def decode(codes: Codes, num_bits: int, dim: int) -> Tensor:
    """Return the vectors that codes stand for, ``[..., dim]``, rotated."""
    return unpack(codes.bits, num_bits, dim) * codes.scale.float().unsqueeze(-1)


def unpack(bits: Tensor, num_bits: int, dim: int) -> Tensor:
    """Return the levels of packed codes, float32 ``[..., dim]``."""
    levels = _look_up(_table(num_bits).to(bits.device), bits)
    return levels.flatten(-2)[..., :dim]


def noise(num_bits: int, dim: int) -> float:
    """Return the standard deviation of an estimated inner product, per unit of both lengths.

    Of the estimate for a vector of length ``scale * |levels|``; a coded direction has the cosine
    ``c`` with the true one, and what is missing is spread over the other dimensions (RaBitQ,
    theorem 3.2, with its bound replaced by the deviation).
    """
    cosine = {1: 0.7979, 2: 0.9402}[num_bits]
    return math.sqrt(1 - cosine**2) / math.sqrt(max(1, dim - 1))


def level_norm(num_bits: int, dim: int) -> float:
    """Return the usual length of the levels of one vector."""
    return math.sqrt(dim) * {1: 1.0, 2: 0.9402}[num_bits]


def _pack(numbers: Tensor, num_bits: int) -> Tensor:
    per_byte = 8 // num_bits
    groups = pad(numbers, (0, -numbers.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed: Tensor
    packed, *others = groups.unbind(-1)
    for place, group in enumerate(others, 1):
        packed = packed | group << place * num_bits
    return packed


def _look_up(table: Tensor, numbers: Tensor) -> Tensor:
    """Return the rows of a table; as fast as ``index_select`` is, in one dimension alone."""
    return table.index_select(0, numbers.flatten().int()).view(*numbers.shape, *table.shape[1:])


@functools.cache
def _table(num_bits: int) -> Tensor:
    """Return the levels of every byte, float32 ``[256, 8 // num_bits]``."""
    per_byte = 8 // num_bits
    shifts = torch.arange(per_byte) * num_bits
    numbers = torch.arange(256).unsqueeze(1) >> shifts & (1 << num_bits) - 1
    levels: Tensor = torch.tensor(_LEVELS[num_bits])[numbers]
    return levels
