"""A pool of equal slots in one slab of memory."""

import heapq
import mmap
from bisect import bisect_right
from collections.abc import Collection

import torch
from torch import Tensor

from offload.errors import CapacityError
from offload.tiers.pinned import PinnedRegion
from offload.types import ChunkLayout, SlotId


class SlotPool:
    """Equal slots in one slab, divided between streams, handed out lowest first.

    Slots of whole pages are page-aligned. The chunks of one layer lie next to each other in order,
    so that attention can read them as one strided view. A stream whose share is full may take slots
    from the others. The slab is address space until it is touched (on a CUDA device it is one
    allocation); ``num_slots`` may shrink, never grow past the slab.

    Invariant: every slot is either free, used, or beyond ``num_slots``. Not thread-safe.

    Parameters
    ----------
    num_slots : int
    slot_bytes : int
        A multiple of the page size, if they are to be page-locked.
    device : torch.device
    pinned : bool
        Page-lock host memory, so that copies to a CUDA device can overlap with compute.
    num_streams : int
        Shares to divide the slots into.
    """

    def __init__(
        self,
        num_slots: int,
        slot_bytes: int,
        device: torch.device,
        *,
        pinned: bool = False,
        num_streams: int = 1,
    ) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        num_bytes = num_slots * slot_bytes
        if device.type == "cpu":
            memory = page_aligned(num_bytes)
        else:
            memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.slab = memory.view(num_slots, slot_bytes)
        self._pinned = PinnedRegion(memory) if pinned else None
        self._starts = [share * num_slots // num_streams for share in range(num_streams)]
        stops = [*self._starts[1:], num_slots]
        self._free = [
            [SlotId(slot) for slot in range(start, stop)]
            for start, stop in zip(self._starts, stops, strict=True)
        ]
        self._used: set[SlotId] = set()

    @property
    def num_free(self) -> int:
        """Slots that ``allocate`` could hand out now."""
        return sum(map(len, self._free))

    def num_free_for(self, stream: int, group: int) -> int:
        """Return the free slots of one stream's own share; see ``Tier.num_free_for``."""
        if self.num_slots < group * len(self._free):
            return self.num_free
        return len(self._free[stream % len(self._free)])

    def allocate(self, n: int, stream: int = 0) -> list[SlotId]:
        """Take ``n`` free slots, the stream's own and lowest first, or raise and take none.

        Raises
        ------
        CapacityError
        """
        if n > self.num_free:
            raise CapacityError(
                f"{n} slots requested, {self.num_free} free of {self.num_slots} "
                f"({self.slot_bytes} bytes each)"
            )
        share, slots = self._free[stream % len(self._free)], []
        for _ in range(n):
            share = share or max(self._free, key=len)
            slots.append(heapq.heappop(share))
        self._used.update(slots)
        if self._pinned is not None:
            self._pin(slots)
        return slots

    def free(self, slots: Collection[SlotId]) -> None:
        """Give slots back; one beyond ``num_slots`` is retired instead."""
        for slot in slots:
            self._used.remove(slot)
            if slot < self.num_slots:
                heapq.heappush(self._free[bisect_right(self._starts, slot) - 1], slot)

    def shrink(self, num_slots: int) -> None:
        """Lower ``num_slots``. Used slots beyond it stay valid until they are freed."""
        self.num_slots = min(self.num_slots, num_slots)
        for share in self._free:
            share[:] = sorted(slot for slot in share if slot < self.num_slots)

    def chunk(self, slot: SlotId, layout: ChunkLayout) -> Tensor:
        """View one slot as a chunk, ``[num_kv_heads, chunk_tokens, row_dim]``."""
        return as_chunk(self.slab[slot], layout)

    def chunks(
        self, base: int, strides: tuple[int, int], counts: tuple[int, int], layout: ChunkLayout
    ) -> Tensor:
        """View a regular grid of slots as chunks, without a copy.

        Parameters
        ----------
        base : int
            Slot of element (0, 0).
        strides : tuple of int
            Slots between neighbours along each axis; may be 0.
        counts : tuple of int
            ``(batch, num_chunks)``.

        Returns
        -------
        Tensor, shape (batch, num_chunks, num_kv_heads, chunk_tokens, row_dim)
        """
        return grid_view(self.slab, base, strides, counts, layout)

    def close(self) -> None:
        """Give up page-locking; the memory itself goes with its last view."""
        if self._pinned is not None:
            self._pinned.close()

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot is neither free nor used, or both."""
        free = [slot for share in self._free for slot in share]
        assert len(set(free)) == len(free)
        assert not self._used.intersection(free)
        inside = sum(slot < self.num_slots for slot in self._used)
        assert inside + len(free) == self.num_slots

    def _pin(self, slots: list[SlotId]) -> None:
        assert self._pinned is not None
        try:
            for slot in slots:
                self._pinned.lock(slot * self.slot_bytes, (slot + 1) * self.slot_bytes)
        except CapacityError:
            self.free(slots)
            raise


def as_chunk(buffer: Tensor, layout: ChunkLayout) -> Tensor:
    """View a ``uint8`` buffer of at least ``layout.chunk_bytes`` as a chunk."""
    return buffer[: layout.chunk_bytes].view(layout.dtype).view(layout.shape)


def grid_view(
    rows: Tensor,
    base: int,
    strides: tuple[int, int],
    counts: tuple[int, int],
    layout: ChunkLayout,
) -> Tensor:
    """View a regular grid of the rows of a ``uint8 [num_slots, slot_bytes]`` tensor as chunks."""
    elements = rows.view(layout.dtype)
    per_slot = elements.stride(0)
    row = layout.row_dim
    return elements.as_strided(
        (*counts, *layout.shape),
        (strides[0] * per_slot, strides[1] * per_slot, layout.chunk_tokens * row, row, 1),
        elements.storage_offset() + base * per_slot,
    )


def page_aligned(num_bytes: int) -> Tensor:
    """Return page-aligned, lazily committed, zeroed host memory as a ``uint8`` tensor."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=torch.uint8)
