"""Keys and values of new tokens, seen as chunks before they are stored."""

from typing import NamedTuple

from torch import Tensor

from offload.tiers.pool import SlotPool, grid_view
from offload.types import ChunkLayout, SlotId


class ChunkSource(NamedTuple):
    """Keys and values, each ``[batch, num_chunks, num_kv_heads, chunk_tokens, dim]``; views."""

    keys: Tensor
    values: Tensor

    def positions(self, start: int, stop: int) -> "ChunkSource":
        """Return a run of positions, for all rows."""
        return ChunkSource(self.keys[:, start:stop], self.values[:, start:stop])

    def fill(self, target: Tensor, layout: ChunkLayout) -> None:
        """Write all chunks to ``[batch, num_chunks, *layout.shape]``."""
        _fill(target, self.keys, self.values, layout)

    def fill_slots(self, pool: SlotPool, slots: list[SlotId], layout: ChunkLayout) -> None:
        """Write all chunks into slots, position by position and then row by row."""
        batch, count = self.keys.shape[:2]
        if slots[-1] - slots[0] == len(slots) - 1:
            grid = grid_view(pool.slab, slots[0], (1, batch), (batch, count), layout)
            self.fill(grid, layout)
            return
        for i, slot in enumerate(slots):
            self.fill_one(pool.chunk(slot, layout), i, layout)

    def fill_one(self, target: Tensor, index: int, layout: ChunkLayout) -> None:
        """Write the chunk with this index, position by position and then row by row."""
        position, row = divmod(index, self.keys.shape[0])
        _fill(target, self.keys[row, position], self.values[row, position], layout)


def split(keys: Tensor, values: Tensor, chunk_tokens: int) -> ChunkSource:
    """Cut ``[batch, num_kv_heads, num_chunks * chunk_tokens, dim]`` into chunks."""
    chunks = (x.unflatten(2, (-1, chunk_tokens)).transpose(1, 2) for x in (keys, values))
    return ChunkSource(*chunks)


def _fill(target: Tensor, keys: Tensor, values: Tensor, layout: ChunkLayout) -> None:
    target[..., : layout.key_dim].copy_(keys, non_blocking=True)
    target[..., layout.key_dim :].copy_(values, non_blocking=True)
