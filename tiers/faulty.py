"""A tier that fails on purpose: what disks do to the tier inside, by a plan and a seed."""

import os
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from torch import Tensor

from offload.errors import ClosedError, ConfigError, StorageError
from offload.tiers.base import Tier
from offload.tiers.buffers import Buffers
from offload.tiers.fault_dice import Damage, Draw, FaultDice
from offload.tiers.faults import FaultCounts, FaultPlan
from offload.tiers.late_transfer import LateTransfer
from offload.tiers.requests import describe
from offload.tiers.syscalls import as_storage_error
from offload.tiers.transfer import FutureTransfer, Transfer
from offload.tiers.wrapped import WrappedTier
from offload.types import ChunkInfo, SlotId

_NO_FAULT: Final = Draw(0.0, None, {})


@runtime_checkable
class HasRecords(Protocol):
    """A tier whose slots are records in files."""

    def place_of(self, slot: SlotId) -> tuple[Path, int, int]:
        """Return the file of a slot, and the offset and number of its record's bytes there."""
        ...


class FaultyTier(WrappedTier):
    """Any tier, with the faults of a plan.

    Delays, hangs and errors act on the way in and out. Flips and truncations are done to the stored
    record, in its file, when its write has ended: noticing them is the job of the tier inside. They
    may hit bytes that mean nothing to it, such as the padding of a slot.

    Keeps the contract of a tier. A write that fails moves nothing; the slot holds what it held. No
    thread is started: a transfer that is held back ends when its time has come, or at ``close``.

    Parameters
    ----------
    inner : Tier
        Closed with this one.
    plan : FaultPlan

    Attributes
    ----------
    is_armed : bool
        While it is false no fault strikes; what lies damaged stays so.

    Raises
    ------
    ConfigError
        The plan damages records, and the tier has none in files.
    """

    def __init__(self, inner: Tier, plan: FaultPlan) -> None:
        if plan.damages_records and not isinstance(inner, HasRecords):
            raise ConfigError(
                f"faults {plan}: the {inner.name} tier has no records in files to damage"
            )
        super().__init__(inner)
        self.is_armed = True
        self._dice = FaultDice(plan)
        self._lock = threading.Lock()
        self._doomed: dict[SlotId, Damage] = {}
        self._damaged: set[SlotId] = set()
        self._closing = threading.Event()

    @property
    def counts(self) -> FaultCounts:
        """What was injected so far."""
        return self._dice.counts

    @property
    def damaged(self) -> frozenset[SlotId]:
        """Slots whose record lies damaged now."""
        with self._lock:
            return frozenset(self._damaged)

    def free(self, slots: Collection[SlotId]) -> None:
        """Give slots back; see ``Tier``. Damage that has not happened yet never will."""
        with self._lock:
            self._forget(slots)
            self.inner.free(slots)

    def read(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], out: Sequence[Tensor]
    ) -> Transfer:
        """Read, perhaps late, perhaps not at all; see ``Tier``."""
        what = describe(self.name, "read", infos)
        return self._read(what, out, lambda: self.inner.read(slots, infos, out))

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
        """Read parts, perhaps late, perhaps not at all; see ``DiskTier.read_parts``.

        Raises
        ------
        ConfigError
            The tier inside reads whole chunks only.
        """
        inner = self.inner_parts
        what = describe(self.name, "read of parts", infos)
        return self._read(
            what,
            out,
            lambda: inner.read_parts(slots, infos, parts, out, num_parts=num_parts, urgent=urgent),
        )

    def write(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], src: Sequence[Tensor]
    ) -> Transfer:
        """Write, perhaps late, perhaps not at all, perhaps with damage to come; see ``Tier``."""
        what = describe(self.name, "write", infos)
        draw = self._dice.draw(what, len(slots)) if self.is_armed and slots else _NO_FAULT
        if draw.error is not None:
            transfer = self._fail(what, src, draw.error)
            return LateTransfer(what, transfer, draw.late_s, self._closing)
        transfer = self.inner.write(slots, infos, src)
        with self._lock:
            self._forget(slots)
            self._doomed |= {slots[i]: damage for i, damage in draw.damages.items()}
        return LateTransfer(what, transfer, draw.late_s, self._closing, lambda: self._damage(slots))

    def close(self) -> None:
        """End what is held back, and close the tier inside. Idempotent."""
        with self._lock:
            self._doomed.clear()
            self._damaged.clear()
        self._closing.set()
        self.inner.close()

    def _read(
        self, what: str, out: Sequence[Tensor] | Buffers, begin: Callable[[], Transfer]
    ) -> Transfer:
        draw = self._dice.draw(what) if self.is_armed and out else _NO_FAULT
        transfer = begin() if draw.error is None else self._fail(what, out, draw.error)
        return LateTransfer(what, transfer, draw.late_s, self._closing)

    def _forget(self, slots: Collection[SlotId]) -> None:
        self._damaged.difference_update(slots)
        for slot in slots:
            self._doomed.pop(slot, None)

    def _damage(self, slots: Sequence[SlotId]) -> None:
        """Damage the records of a write that has ended; the lock keeps them from being freed."""
        with self._lock:
            for slot in slots:
                damage = self._doomed.pop(slot, None)
                if damage is not None:
                    self._damage_one(slot, damage)

    def _damage_one(self, slot: SlotId, damage: Damage) -> None:
        assert isinstance(self.inner, HasRecords)
        path, offset, num_bytes = self.inner.place_of(slot)
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                damage.apply(fd, offset, num_bytes)
            finally:
                os.close(fd)
        except OSError as error:
            raise as_storage_error(error, f"cannot damage {path}") from error
        self._damaged.add(slot)
        self._dice.count_damage(damage)

    def _fail(
        self, what: str, buffers: Sequence[Tensor] | Buffers, error: StorageError
    ) -> Transfer:
        """Return a transfer that is over, badly."""
        if self._closing.is_set():
            raise ClosedError(f"the {self.name} tier is closed")
        future: Future[None] = Future()
        future.set_exception(error)
        return FutureTransfer(what, sum(buffer.nbytes for buffer in buffers), [future])
