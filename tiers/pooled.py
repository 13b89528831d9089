"""What tiers in memory have in common: a pool of slots with a capacity."""

from collections.abc import Collection

import torch

from offload.errors import CapacityError, ClosedError
from offload.tiers.base import Tier
from offload.tiers.pool import SlotPool
from offload.types import ChunkLayout, SlotId


class PooledTier(Tier):
    """A tier whose slots lie in memory, encoded or not. Subclasses read and write.

    Parameters
    ----------
    name : str
        ``"gpu"`` or ``"cpu"``.
    capacity_bytes : int
    layout : ChunkLayout
    slot_bytes : int
    device : torch.device
        Where the slots live.
    pinned : bool
        Page-lock the slots (host memory beside a CUDA device).
    num_streams : int
        Streams that share the slots evenly, see ``SlotPool``.
    """

    def __init__(
        self,
        name: str,
        *,
        capacity_bytes: int,
        layout: ChunkLayout,
        slot_bytes: int,
        device: torch.device,
        pinned: bool = False,
        num_streams: int = 1,
    ) -> None:
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.layout = layout
        self.slot_bytes = slot_bytes
        num_slots = capacity_bytes // slot_bytes
        self.pool = SlotPool(num_slots, slot_bytes, device, pinned=pinned, num_streams=num_streams)
        self._closed = False

    @property
    def num_slots(self) -> int:
        """Slots the capacity allows."""
        return self.pool.num_slots

    @property
    def num_free(self) -> int:
        """Slots that ``allocate`` could hand out now."""
        return self.pool.num_free

    @property
    def used_bytes(self) -> int:
        """Bytes occupied now."""
        return (self.num_slots - self.num_free) * self.slot_bytes

    def allocate(self, n: int, stream: int = 0) -> list[SlotId]:
        """Take ``n`` slots, the lowest free ones, or none."""
        if self._closed:
            raise ClosedError(f"the {self.name} tier is closed")
        try:
            return self.pool.allocate(n, stream)
        except CapacityError as error:
            raise CapacityError(f"{self.name} tier full: {error}") from None

    def num_free_for(self, stream: int, group: int) -> int:
        """Return the free slots of one stream's own share."""
        return self.pool.num_free_for(stream, group)

    def free(self, slots: Collection[SlotId]) -> None:
        """Give slots back."""
        self.pool.free(slots)

    def check_integrity(self) -> None:
        """Raise AssertionError if the invariant does not hold."""
        self.pool.check_integrity()
        assert self.used_bytes <= self.capacity_bytes

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        if not self._closed:
            self._closed = True
            self.pool.close()
            self.pool = SlotPool(0, self.slot_bytes, torch.device("cpu"))
