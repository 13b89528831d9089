"""The contract of a tier: one level of the hierarchy."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from offload.tiers.buffers import Buffers
from offload.tiers.transfer import Transfer
from offload.types import ChunkInfo, SlotId


class Tier(ABC):
    """One level of the hierarchy. Owns slots and bytes; knows no policy, no model, no other tier.

    Invariant: ``num_free + num_used == num_slots`` and ``used_bytes <= capacity_bytes``, at every
    return from a method, failed ones included.

    One thread allocates and frees; transfers run on any thread. A buffer is a 1-D ``uint8`` CPU or
    device tensor of the ``slot_bytes`` of the layout, page-aligned where the tier is a disk.

    Attributes
    ----------
    name : {"gpu", "cpu", "disk"}
    capacity_bytes : int
        Hard limit, every byte the tier occupies included (headers, padding).
    slot_bytes : int
        Bytes of one slot, a multiple of the page size; of a tier in memory that encodes, fewer.
    """

    name: str
    capacity_bytes: int
    slot_bytes: int

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """Slots the capacity allows."""

    @property
    @abstractmethod
    def num_free(self) -> int:
        """Slots that ``allocate`` could hand out now."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes occupied now."""

    @abstractmethod
    def allocate(self, n: int, stream: int = 0) -> list[SlotId]:
        """Take ``n`` slots, or none.

        Parameters
        ----------
        n : int
        stream : int
            Slots of one stream (a layer) are read together; the tier may lay them out so.

        Raises
        ------
        CapacityError
            Fewer than ``n`` slots are free. Nothing was taken.
        ClosedError
            The tier was closed.
        """

    def num_free_for(self, stream: int, group: int) -> int:
        """Return how many slots a stream can take without cutting into the share of another.

        Slots are taken ``group`` at a time (one for each row of a batch); shares too small for one
        group are not kept apart.
        """
        return self.num_free

    def is_own(self, slot: SlotId) -> bool:
        """Whether freeing a slot makes room; a tier may lend records that belong to others."""
        return True

    @abstractmethod
    def free(self, slots: Collection[SlotId]) -> None:
        """Give slots back. Their content is gone."""

    @abstractmethod
    def read(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], out: Sequence[Tensor]
    ) -> Transfer:
        """Copy slots into buffers.

        Parameters
        ----------
        slots, infos, out : sequences of equal length
            Where from, what must be found there, and where to.

        Returns
        -------
        Transfer
            Its ``wait`` raises CorruptChunk or StorageError if any slot could not be read as
            written; ``out`` then holds nothing of use and the slots are unchanged.
        """

    @abstractmethod
    def write(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], src: Sequence[Tensor]
    ) -> Transfer:
        """Copy buffers into slots.

        Returns
        -------
        Transfer
            Its ``wait`` raises DiskFull or StorageError if any slot was not written; the caller
            still owns both the slots (to free) and the source.
        """

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError if the invariant does not hold."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is in flight, then give everything back. Idempotent."""


@runtime_checkable
class ReadsParts(Protocol):
    """A tier of whose slots parts can be read: runs of tokens of single KV heads.

    Attributes
    ----------
    part_bytes : int
        Bytes of the smallest part that can be read and verified by itself.
    parts_per_head : int
    """

    @property
    def part_bytes(self) -> int: ...  # noqa: D102
    @property
    def parts_per_head(self) -> int: ...  # noqa: D102

    def read_parts(
        self,
        slots: Sequence[SlotId],
        infos: Sequence[ChunkInfo],
        parts: slice | Sequence[int],
        out: Sequence[Tensor] | Buffers,
        *,
        num_parts: int = 1,
        urgent: bool = True,
    ) -> Transfer:
        """Copy parts of slots into buffers; see ``DiskTier.read_parts``."""
        ...
