"""The device and host tiers: chunks in memory as they are, to be read where they lie."""

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.tiers.pooled import PooledTier
from offload.tiers.transfer import CompletedTransfer, Transfer
from offload.types import ChunkInfo, ChunkLayout, SlotId


class MemoryTier(PooledTier):
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
        super().__init__(
            name,
            capacity_bytes=capacity_bytes,
            layout=layout,
            slot_bytes=layout.slot_bytes,
            device=device,
            pinned=pinned,
            num_streams=num_streams,
        )

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
