"""Where chunks begin in memory, remembered while they stay there."""

from collections.abc import Iterable

from offload.engine import Engine
from offload.tiers.memory import MemoryTier
from offload.types import ChunkId


class ChunkAddresses:
    """Looks up addresses of chunks in the pools of an engine's tiers.

    A prompt of 100,000 tokens has thousands of chunks in every layer, and somebody fills one every
    few steps: what is known is not looked up again, and only a chunk that moves is forgotten.

    Used by the thread that runs the model.

    Parameters
    ----------
    engine : Engine

    Attributes
    ----------
    version : int
        Grows when an address that was handed out is no longer right.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.version = 0
        self._known: dict[ChunkId, int] = {}
        engine.store.watch(self._forget)

    def find(self, chunks: Iterable[ChunkId]) -> list[int] | None:
        """Return the address of each chunk; None if one is not in memory."""
        known, found = self._known, []
        for chunk in chunks:
            address = known.get(chunk) or self._look_up(chunk)
            if not address:
                return None
            found.append(address)
        return found

    def _look_up(self, chunk: ChunkId) -> int:
        """Return an address, to be remembered; 0 if the chunk is not in memory."""
        slots = self.engine.store.table[chunk].slots
        level = min(slots, default=-1)
        tier = self.engine.tiers[level]
        if level < 0 or not isinstance(tier, MemoryTier):
            return 0
        address = self._known[chunk] = tier.pool.slab.data_ptr() + slots[level] * tier.slot_bytes
        return address

    def _forget(self, chunk: ChunkId) -> None:
        if self._known.pop(chunk, None) is not None:
            self.version += 1
