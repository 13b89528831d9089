"""A disk tier with a remote one below it: together the last tier of a store."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from offload.errors import CapacityError
from offload.tiers.base import ReadsParts, Tier
from offload.tiers.joined_transfer import JoinedTransfer
from offload.tiers.transfer import Transfer
from offload.types import ChunkInfo, SlotId

_FIRST_REMOTE = 1 << 62
"""Slots from here on are remote; those of a disk tier are smaller by far."""


class DiskThenRemote(Tier):
    """What does not fit on the disk goes to the object store.

    A slot lies in one of the two, for good. Slots of the disk keep their numbers, so that whoever
    knows the disk tier itself can ask it about them.

    Parameters
    ----------
    disk : Tier
        From which parts can be read; closed with this one.
    remote : Tier
        Of the same layout, and as ``disk``; closed with this one.

    Attributes
    ----------
    disk_peak_bytes, remote_peak_bytes : int
        Most bytes that either has held.
    loaded_bytes, stored_bytes : int
        Moved out of and into the remote one, as far as anybody asked.
    """

    name = "disk"

    def __init__(self, disk: Tier, remote: Tier) -> None:
        assert isinstance(disk, ReadsParts)
        assert isinstance(remote, ReadsParts)
        assert disk.slot_bytes == remote.slot_bytes
        self.disk, self.remote = disk, remote
        self.capacity_bytes = disk.capacity_bytes + remote.capacity_bytes
        self.slot_bytes = disk.slot_bytes
        self.part_bytes, self.parts_per_head = disk.part_bytes, disk.parts_per_head
        self.disk_peak_bytes = self.remote_peak_bytes = 0
        self.loaded_bytes = self.stored_bytes = 0
        self._parts: tuple[ReadsParts, ReadsParts] = (disk, remote)

    @property
    def num_slots(self) -> int:
        """Slots of both."""
        return self.disk.num_slots + self.remote.num_slots

    @property
    def num_free(self) -> int:
        """Free slots of both."""
        return self.disk.num_free + self.remote.num_free

    @property
    def used_bytes(self) -> int:
        """Bytes occupied in both."""
        return self.disk.used_bytes + self.remote.used_bytes

    def allocate(self, n: int, stream: int = 0) -> list[SlotId]:
        """Take slots, on the disk as long as there are any; see ``Tier``."""
        on_disk = min(n, self.disk.num_free)
        if n - on_disk > self.remote.num_free:
            raise CapacityError(
                f"disk and remote tiers full: {n} slots asked for, {self.disk.num_free} and "
                f"{self.remote.num_free} of {self.num_slots} free"
            )
        slots = self.disk.allocate(on_disk, stream)
        try:
            slots += [_outer(slot) for slot in self.remote.allocate(n - on_disk, stream)]
        except BaseException:
            self.disk.free(slots)
            raise
        self.disk_peak_bytes = max(self.disk_peak_bytes, self.disk.used_bytes)
        self.remote_peak_bytes = max(self.remote_peak_bytes, self.remote.used_bytes)
        return slots

    def is_own(self, slot: SlotId) -> bool:
        """Whether freeing a slot makes room; see ``Tier``."""
        return is_remote(slot) or self.disk.is_own(slot)

    def free(self, slots: Collection[SlotId]) -> None:
        """Give slots back; see ``Tier``."""
        self.disk.free([slot for slot in slots if not is_remote(slot)])
        self.remote.free([_inner(slot) for slot in slots if is_remote(slot)])

    def read(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], out: Sequence[Tensor]
    ) -> Transfer:
        """Read from both at the same time; see ``Tier``."""
        near, far = _divide(slots)
        inner = [_inner(slot) for slot in slots]
        transfers = [
            tier.read(_pick(inner, part), _pick(infos, part), _pick(out, part))
            for tier, part in ((self.remote, far), (self.disk, near))
            if part
        ]
        self.loaded_bytes += len(far) * self.slot_bytes
        return _joined(transfers)

    def read_parts(
        self,
        slots: Sequence[SlotId],
        infos: Sequence[ChunkInfo],
        parts: slice | Sequence[int],
        out: Sequence[Any],
        *,
        num_parts: int = 1,
        urgent: bool = True,
    ) -> Transfer:
        """Read parts from both at the same time; see ``DiskTier.read_parts``."""
        transfers, inner = [], [_inner(slot) for slot in slots]
        for tier, part in zip(self._parts, _divide(slots), strict=True):
            if part:
                firsts = parts if isinstance(parts, slice) else _pick(parts, part)
                transfers.append(
                    tier.read_parts(
                        _pick(inner, part),
                        _pick(infos, part),
                        firsts,
                        _pick(out, part),
                        num_parts=num_parts,
                        urgent=urgent,
                    )
                )
        return _joined(transfers)

    def write(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], src: Sequence[Tensor]
    ) -> Transfer:
        """Write to both at the same time; see ``Tier``."""
        near, far = _divide(slots)
        inner = [_inner(slot) for slot in slots]
        transfers = [
            tier.write(_pick(inner, part), _pick(infos, part), _pick(src, part))
            for tier, part in ((self.disk, near), (self.remote, far))
            if part
        ]
        self.stored_bytes += len(far) * self.slot_bytes
        return _joined(transfers)

    def check_integrity(self) -> None:
        """Raise AssertionError if the invariant of either does not hold."""
        self.disk.check_integrity()
        self.remote.check_integrity()

    def close(self) -> None:
        """Close both, the disk also if the store cannot be reached. Idempotent."""
        try:
            self.remote.close()
        finally:
            self.disk.close()


def is_remote(slot: SlotId) -> bool:
    """Whether a slot of ``DiskThenRemote`` lies in the object store."""
    return slot >= _FIRST_REMOTE


def _outer(slot: SlotId) -> SlotId:
    return SlotId(slot + _FIRST_REMOTE)


def _inner(slot: SlotId) -> SlotId:
    return SlotId(slot - _FIRST_REMOTE) if is_remote(slot) else slot


def _divide(slots: Sequence[SlotId]) -> tuple[list[int], list[int]]:
    """Return which of some slots are on the disk, and which are not."""
    far = [i for i, slot in enumerate(slots) if is_remote(slot)]
    near = [i for i, slot in enumerate(slots) if not is_remote(slot)]
    return near, far


def _pick(things: Sequence[Any], part: Sequence[int]) -> list[Any]:
    return [things[i] for i in part]


def _joined(transfers: Sequence[Transfer]) -> Transfer:
    return transfers[0] if len(transfers) == 1 else JoinedTransfer(transfers)
