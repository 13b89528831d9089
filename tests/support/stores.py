"""Chunks for a ``ChunkStore``, and what they must read back as."""

import torch
from torch import Tensor

from offload.store import ChunkStore
from offload.types import ChunkId, ChunkLayout

LAYOUT = ChunkLayout(2, 4, 8, 8, torch.float32)

Contents = dict[ChunkId, Tensor]
"""What each chunk holds, ``[num_kv_heads, chunk_tokens, row_dim]``."""


def put(store: ChunkStore, n: int, seed: int, layer: int = 0) -> Contents:
    """Put ``n`` chunks in one call; return what each must read back as."""
    shape = (1, 2, n * LAYOUT.chunk_tokens, 8)
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    columns = store.put(layer, 0, keys, values)
    both = torch.cat([keys, values], -1)[0].split(LAYOUT.chunk_tokens, 1)
    return {chunk: content for [chunk], content in zip(columns, both, strict=True)}


def check(store: ChunkStore, expected: Contents) -> None:
    store.check_integrity()
    for chunk, content in expected.items():
        assert torch.equal(store.read_chunk(chunk), content)
