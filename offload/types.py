"""The nouns shared by every part: chunk identity, chunk layout, partial results. No behaviour."""

from dataclasses import dataclass
from typing import NamedTuple, NewType

import torch

ChunkId = NewType("ChunkId", int)
"""Names one immutable chunk for the life of a store; never reused."""

SlotId = NewType("SlotId", int)
"""A chunk-sized place in one tier's pool."""

PAGE_BYTES = 4096
"""Alignment of slots and of records on disk, so that both can be read with ``O_DIRECT``."""


def round_up(num_bytes: int, multiple: int = PAGE_BYTES) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``num_bytes``."""
    return -(-num_bytes // multiple) * multiple


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Shape and dtype of a chunk: ``[num_kv_heads, chunk_tokens, key_dim + value_dim]``.

    One row per head and token, K then V, so a head is contiguous and models whose keys and values
    differ in width (MLA) need no special case. The same bytes lie in memory and in a raw record.
    """

    num_kv_heads: int
    chunk_tokens: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def row_dim(self) -> int:
        """Elements in one row: K and V of one head and one token."""
        return self.key_dim + self.value_dim

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(num_kv_heads, chunk_tokens, row_dim)``."""
        return (self.num_kv_heads, self.chunk_tokens, self.row_dim)

    @property
    def num_elements(self) -> int:
        """Elements in one chunk."""
        return self.num_kv_heads * self.chunk_tokens * self.row_dim

    @property
    def chunk_bytes(self) -> int:
        """Bytes in one chunk, without padding."""
        return self.num_elements * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes a chunk occupies in a pool: ``chunk_bytes`` rounded up to whole pages."""
        return round_up(self.chunk_bytes)


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """What a record on disk says about its chunk, checked again when it is read.

    Attributes
    ----------
    chunk_id : int
        Identity within the store that wrote it.
    layer : int
        Index of the model layer.
    first_token : int
        Position in the sequence of the chunk's first token.
    """

    chunk_id: int
    layer: int
    first_token: int


class Partial(NamedTuple):
    """Attention over a part of the keys; parts merge exactly (see ``kernels.reference.merge``).

    Attributes
    ----------
    out : Tensor, shape (batch, num_heads, num_queries, value_dim), float32
        Softmax-weighted mean of the values of this part. Zero where the part is empty.
    lse : Tensor, shape (batch, num_heads, num_queries), float32
        Log of the sum of exponentiated scores. ``-inf`` where the part is empty.
    """

    out: torch.Tensor
    lse: torch.Tensor
