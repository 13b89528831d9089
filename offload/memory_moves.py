"""How chunks get into tiers in memory and from there to the next one, encoded or as they are."""

from collections.abc import Sequence

from torch import Tensor

from offload.source import ChunkSource
from offload.tiers.base import Tier
from offload.tiers.coded import CodedTier
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import as_chunk, page_aligned
from offload.tiers.pooled import PooledTier
from offload.types import ChunkInfo, ChunkLayout, SlotId
from offload.write_queue import settle


def fill_slots(
    tier: PooledTier,
    slots: list[SlotId],
    infos: Sequence[ChunkInfo],
    source: ChunkSource,
    layout: ChunkLayout,
) -> None:
    """Write all chunks of a source into slots, position by position and then row by row."""
    if isinstance(tier, MemoryTier):
        source.fill_slots(tier.pool, slots, layout)
        return
    content = page_aligned(layout.slot_bytes)
    for i, (slot, info) in enumerate(zip(slots, infos, strict=True)):
        source.fill_one(as_chunk(content, layout), i, layout)
        settle()  # what is encoded has to have come from a CUDA device
        tier.write([slot], [info], [content]).wait()


def copy_slot(source: Tier, slot: SlotId, info: ChunkInfo, tier: Tier, target: SlotId) -> None:
    """Copy a chunk from one tier in memory to a slot of the same one, or of one below."""
    if isinstance(source, CodedTier):
        assert source is tier, "there is no memory below a tier that encodes"
        source.copy(slot, target)
        return
    assert isinstance(source, MemoryTier)
    tier.write([target], [info], [source.buffer(slot)]).wait()


def copy_down(source: Tier, slot: SlotId, info: ChunkInfo, buffer: Tensor) -> None:
    """Fill a host buffer, from which the disk will be written, with a chunk in memory."""
    if isinstance(source, CodedTier):
        source.hand_over(slot, info, buffer)
    else:
        source.read([slot], [info], [buffer])
