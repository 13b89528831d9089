"""Tables of a scan made of random numbers."""

import torch
from torch import Tensor

from offload.kernels import codes
from offload.kernels.scan import ScanTables

SIZES = ((150, 6), (37, 3))
"""Tokens and clusters of two segments, neither a multiple of 16 tokens."""


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_tables(
    dim: int, num_bits: int, *, share: float = 0.5, num_heads: int = 2
) -> tuple[ScanTables, Tensor]:
    """Return tables of random clusters, one of them empty, and the owner of each place."""
    generator = torch.Generator().manual_seed(dim + num_bits)
    counts = torch.empty(num_heads, 0, dtype=torch.int16)
    owner = torch.empty(num_heads, 0, dtype=torch.int32)
    for num_tokens, num_clusters in SIZES:
        own = torch.randint(1, num_clusters, (num_heads, num_tokens), generator=generator)
        own = own.sort(1).values
        sizes = torch.stack([row.bincount(minlength=num_clusters) for row in own])
        filling = torch.full((num_heads, -num_tokens % 16), -1)
        owner = torch.cat([owner, (own + counts.shape[1]).int(), filling.int()], 1)
        counts = torch.cat([counts, sizes.short()], 1)
    num_clusters, num_places = counts.shape[1], owner.shape[1]
    keys = codes.encode(draw(num_heads, num_places, dim, seed=20), num_bits, unbiased=True)
    shape = (num_heads, num_clusters, dim)
    tables = ScanTables(
        centroids=torch.randint(-127, 128, shape, generator=generator).to(torch.int8),
        centroid_scale=draw(*shape[:2], seed=21).abs().div(50).bfloat16(),
        value_means=torch.zeros(shape, dtype=torch.int8),
        value_mean_scale=torch.ones(shape[:2], dtype=torch.bfloat16),
        counts=counts,
        spread=torch.ones(shape[:2], dtype=torch.bfloat16),
        radius=draw(*shape[:2], seed=22).abs().bfloat16(),
        key_bits=keys.bits,
        key_scale=keys.scale,
        value_bits=torch.zeros(num_heads, num_places // 16, 16, 4, dtype=torch.uint8),
        value_scale=torch.zeros(num_heads, num_places, dtype=torch.bfloat16),
        basis=torch.zeros(num_heads, len(SIZES), 32, dim, dtype=torch.float16),
        sizes=SIZES,
        num_bits=num_bits,
        share=share,
    )
    return tables, owner
