"""The device and host tiers: a pool of slots in memory."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from offload.errors import CapacityError, ClosedError
from offload.tiers.base import Tier
from offload.tiers.pool import SlotPool
from offload.tiers.transfer import CompletedTransfer, Transfer
from offload.types import ChunkInfo, ChunkLayout, SlotId


class MemoryTier(Tier):
    """A tier in device or host memory.

    Copies run on the caller's thread; between a CUDA device and pinned memory they are queued on
    the caller's current stream, and ordering them with compute is the caller's job.

    Parameters
    ----------
    name : str
        ``"gpu"`` or ``"cpu"``.
    capacity_bytes : int
    layout : ChunkLayout
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
        device: torch.device,
        pinned: bool = False,
        num_streams: int = 1,
    ) -> None:
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.layout = layout
        self.slot_bytes = layout.slot_bytes
        self.pool = SlotPool(
            capacity_bytes // self.slot_bytes,
            self.slot_bytes,
            device,
            pinned=pinned,
            num_streams=num_streams,
        )
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

    def buffer(self, slot: SlotId) -> Tensor:
        """Return a slot's bytes, ``uint8 [slot_bytes]``, in place."""
        return self.pool.slab[slot]

    def read(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], out: Sequence[Tensor]
    ) -> Transfer:
        """Copy slots into buffers, on the current stream."""
        for slot, target in zip(slots, out, strict=True):
            target.copy_(self.pool.slab[slot], non_blocking=True)
        return CompletedTransfer(len(slots) * self.slot_bytes)

    def write(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], src: Sequence[Tensor]
    ) -> Transfer:
        """Copy buffers into slots, on the current stream."""
        for slot, source in zip(slots, src, strict=True):
            self.pool.slab[slot].copy_(source, non_blocking=True)
        return CompletedTransfer(len(slots) * self.slot_bytes)

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
