"""How rows are named.

A head of a chunk is what the disk reads and verifies by itself: a *piece*. A row in it, one token,
has a *key*::

    piece = chunk * num_kv_heads + head
    key = piece * chunk_tokens + token
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offload.types import ChunkId, ChunkLayout

Ints = NDArray[np.int64]
Rows = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class RowKeys:
    """Names of rows of chunks of one layout, and what they say.

    Attributes
    ----------
    num_kv_heads, chunk_tokens, row_bytes : int
    """

    num_kv_heads: int
    chunk_tokens: int
    row_bytes: int

    @classmethod
    def of(cls, layout: ChunkLayout) -> "RowKeys":
        """Return the names for chunks of a layout."""
        return cls(layout.num_kv_heads, layout.chunk_tokens, layout.row_dim * layout.dtype.itemsize)

    @property
    def per_chunk(self) -> int:
        """Keys of one chunk; the first one is a multiple of it."""
        return self.num_kv_heads * self.chunk_tokens

    @property
    def head_bytes(self) -> int:
        """Bytes of a piece."""
        return self.chunk_tokens * self.row_bytes

    def keys(self, chunks: Ints, heads: Ints, tokens: Ints) -> Ints:
        """Return the keys of rows, given by arrays of one shape."""
        return (chunks * self.num_kv_heads + heads) * self.chunk_tokens + tokens

    def pieces(self, keys: Ints) -> Ints:
        """Return the piece of each key."""
        return keys // self.chunk_tokens

    def chunk_and_head(self, piece: int) -> tuple[ChunkId, int]:
        """Return what a piece is a head of."""
        chunk, head = divmod(piece, self.num_kv_heads)
        return ChunkId(chunk), head

    def by_piece(self, keys: Ints) -> dict[int, Ints]:
        """Divide keys by piece; pieces in the order of their first keys."""
        pieces, first, which = np.unique(self.pieces(keys), return_index=True, return_inverse=True)
        parts = np.split(keys[np.argsort(which, kind="stable")], np.cumsum(np.bincount(which))[:-1])
        return {int(pieces[i]): parts[i] for i in np.argsort(first, kind="stable")}
