"""Indexes over the chunks of a layer, built from what is stored."""

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.chunk_reader import start_read
from offload.index.base import KeyIndex
from offload.sparse_plan import BuildIndex, SegmentSizes
from offload.store import ChunkStore
from offload.tiers.pool import as_chunk, page_aligned
from offload.types import ChunkId

_Segment = tuple[ChunkId, ...]


class LayerIndexes:
    """The indexes of all layers of one store, by the chunks they are over.

    Chunks are immutable and never named twice, so an index over some chunks is right for every row,
    beam and fork that has them. Only the thread that holds the engine's lock calls methods.

    Parameters
    ----------
    store : ChunkStore
    device : torch.device
        Where indexes live.
    build : callable
    sizes : SegmentSizes
    """

    def __init__(
        self, store: ChunkStore, device: torch.device, build: BuildIndex, sizes: SegmentSizes
    ) -> None:
        self._store = store
        self._device = device
        self._build = build
        self.sizes = sizes
        self._segments: dict[_Segment, KeyIndex] = {}
        self._joined: dict[tuple[_Segment, ...], KeyIndex] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(index.num_bytes for index in self._segments.values())

    def over(self, chunks: Sequence[ChunkId]) -> tuple[KeyIndex | None, int]:
        """Return an index over the beginning of a run of chunks, and how many it covers.

        What is missing is built now, from the stored chunks.
        """
        cuts = self.sizes.cut(len(chunks), self._store.layout.chunk_tokens)
        if not cuts:
            return None, 0
        segments = tuple(tuple(chunks[start:stop]) for start, stop in cuts)
        joined = self._joined.get(segments)
        if joined is None:
            parts = [self._segment(segment) for segment in segments]
            joined = type(parts[0]).join(parts)
            self._forget_dead()
            self._joined[segments] = joined
        return joined, cuts[-1][1]

    def _segment(self, chunks: _Segment) -> KeyIndex:
        found = self._segments.get(chunks)
        if found is None:
            found = self._segments[chunks] = self._build(*self._read(chunks))
        return found

    def _read(self, chunks: _Segment) -> tuple[Tensor, Tensor]:
        """Return keys and values of chunks, ``[num_kv_heads, num_tokens, dim]``, on the device."""
        store, layout = self._store, self._store.layout
        memory = page_aligned(len(chunks) * layout.slot_bytes)
        buffers = list(memory.view(len(chunks), layout.slot_bytes))
        start_read(store.tiers, store.table, chunks, buffers).wait(store.deadline_s)
        rows = torch.cat([as_chunk(buffer, layout) for buffer in buffers], 1).to(self._device)
        return rows[..., : layout.key_dim], rows[..., layout.key_dim :]

    def _forget_dead(self) -> None:
        """Drop indexes over chunks that are gone, and joins that a longer one replaces."""
        table = self._store.table
        self._segments = {
            chunks: index
            for chunks, index in self._segments.items()
            if all(chunk in table for chunk in chunks)
        }
        alive = self._segments.keys()
        self._joined = {
            parts: index
            for parts, index in self._joined.items()
            if all(part in alive for part in parts)
        }
