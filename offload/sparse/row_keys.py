"""How rows are named.

A row, one token of one head of a chunk, has a *key*; a run of rows that is read from the disk
together is a *piece*, a head of a chunk or an even part of one::

    key = (chunk * num_kv_heads + head) * chunk_tokens + token
    piece = key // piece_tokens
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offload.sparse.row_wanted import Wanted
from offload.types import ChunkId, ChunkLayout

Ints = NDArray[np.int64]
Rows = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class RowKeys:
    """Names of rows of chunks of one layout, and what they say.

    Attributes
    ----------
    num_kv_heads, chunk_tokens, row_bytes : int
    piece_tokens : int
        Divides ``chunk_tokens``.
    """

    num_kv_heads: int
    chunk_tokens: int
    row_bytes: int
    piece_tokens: int

    @classmethod
    def of(cls, layout: ChunkLayout, piece_tokens: int | None = None) -> "RowKeys":
        """Return the names for chunks of a layout; a piece is a head unless said otherwise."""
        row_bytes = layout.row_dim * layout.dtype.itemsize
        tokens = layout.chunk_tokens
        return cls(layout.num_kv_heads, tokens, row_bytes, piece_tokens or tokens)

    @property
    def per_chunk(self) -> int:
        """Keys of one chunk; the first one is a multiple of it."""
        return self.num_kv_heads * self.chunk_tokens

    @property
    def piece_bytes(self) -> int:
        """Bytes of a piece."""
        return self.piece_tokens * self.row_bytes

    @property
    def pieces_per_chunk(self) -> int:
        """Pieces of all heads of a chunk."""
        return self.per_chunk // self.piece_tokens

    def keys(self, chunks: Ints, heads: Ints, tokens: Ints) -> Ints:
        """Return the keys of rows, given by arrays of one shape."""
        return (chunks * self.num_kv_heads + heads) * self.chunk_tokens + tokens

    def pieces(self, keys: Ints) -> Ints:
        """Return the piece of each key."""
        return keys // self.piece_tokens

    def chunk_of(self, piece: int) -> ChunkId:
        """Return the chunk of a piece."""
        return ChunkId(piece // self.pieces_per_chunk)

    def chunks_and_places(self, pieces: Ints) -> tuple[list[ChunkId], Ints, Ints]:
        """Return the chunks that pieces are of, which one each is of, and which piece of it."""
        chunks, places = np.divmod(pieces, self.pieces_per_chunk)
        names, which = np.unique(chunks, return_inverse=True)
        return list(map(ChunkId, names.tolist())), which, places

    def wanted(self, keys: Ints) -> Wanted:
        """Divide keys by piece; pieces in the order of their first keys."""
        return Wanted.of(keys, self.pieces(keys))
