"""Where there is room for chunks, and where it could be made. Pure: nothing moves here."""

from collections.abc import Sequence

from offload.errors import CapacityError
from offload.table import ChunkTable
from offload.tiers.base import Tier
from offload.types import ChunkId


def describe_room(tiers: Sequence[Tier]) -> str:
    """Return how full every tier is, for messages."""
    free = ", ".join(f"{tier.name} {tier.num_free} of {tier.num_slots}" for tier in tiers)
    return f"free slots: {free}"


def no_room(tiers: Sequence[Tier], num_chunks: int) -> CapacityError:
    """Return the error for chunks that no tier has room for."""
    return CapacityError(
        f"no room for {num_chunks} more chunks of {tiers[0].slot_bytes} bytes; "
        f"{describe_room(tiers)}; raise a capacity or add a tier"
    )


def second_copies(tiers: Sequence[Tier], table: ChunkTable) -> list[ChunkId]:
    """Return the chunks whose copy in the last tier is a second one that may be dropped."""
    last = len(tiers) - 1
    entries = ((chunk, table[chunk]) for chunk in table)
    return [
        chunk
        for chunk, entry in entries
        if len(entry.slots) > 1
        and not entry.protect_count
        and last in entry.slots
        and tiers[last].is_own(entry.slots[last])
    ]
