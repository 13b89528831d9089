"""Draw faults by a plan and a seed, and damage records."""

import dataclasses
import errno
import os
import random
import threading
from typing import NamedTuple

from offload.errors import DiskFull, StorageError
from offload.tiers.faults import AT_REST, TIMED, FaultCounts, FaultPlan
from offload.types import PAGE_BYTES


class Damage(NamedTuple):
    """What will happen to a record at rest.

    Attributes
    ----------
    kind : {"truncate", "flip"}
    where : float
        The place in the record, as a fraction of it in [0, 1).
    """

    kind: str
    where: float

    def apply(self, fd: int, offset: int, num_bytes: int) -> None:
        """Change the record that lies at ``offset`` of a file, ``num_bytes`` long, whole pages."""
        if self.kind == "truncate":
            # Zeroed, not cut: the file goes on with other records.
            start = int(self.where * (num_bytes // PAGE_BYTES)) * PAGE_BYTES
            os.pwrite(fd, bytes(num_bytes - start), offset + start)
            return
        bit = int(self.where * num_bytes * 8)
        position = offset + bit // 8
        [byte] = os.pread(fd, 1, position)
        os.pwrite(fd, bytes([byte ^ 1 << bit % 8]), position)


class Draw(NamedTuple):
    """The fate of one transfer.

    Attributes
    ----------
    late_s : float
        How long it is held back.
    error : StorageError or None
        What it raises instead of moving anything.
    damages : dict of int to Damage
        Of the records with these indexes, once they are written.
    """

    late_s: float
    error: StorageError | None
    damages: dict[int, Damage]


class FaultDice:
    """Draws faults by a plan, and counts them. Any thread may call any method.

    Every kind is drawn every time, so that a rate changes nothing but the faults of its own kind.

    Parameters
    ----------
    plan : FaultPlan
    """

    def __init__(self, plan: FaultPlan) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._lock = threading.Lock()
        self._counts = FaultCounts()

    @property
    def counts(self) -> FaultCounts:
        """What was injected so far, as a copy."""
        with self._lock:
            return dataclasses.replace(self._counts)

    def draw(self, what: str, num_written: int | None = None) -> Draw:
        """Decide about one transfer.

        Parameters
        ----------
        what : str
            Names it in errors.
        num_written : int, optional
            Records that it writes; by default it reads.
        """
        with self._lock:
            late_s, error = self._late_s(), self._error(what, is_write=num_written is not None)
            damages = [self._damage() for _ in range(num_written or 0)]
            return Draw(late_s, error, {i: found for i, found in enumerate(damages) if found})

    def count_damage(self, damage: Damage) -> None:
        """Note that damage was done: a write that fails leaves nothing to damage."""
        with self._lock:
            self._count(damage.kind)

    def _late_s(self) -> float:
        struck = [kind for kind in TIMED if self._strikes(kind)]
        for kind in struck:
            self._count(kind)
        return float(sum(getattr(self._plan, f"{kind}_s") for kind in struck))

    def _error(self, what: str, *, is_write: bool) -> StorageError | None:
        fails, is_full = self._strikes("fail"), is_write and self._strikes("full")
        if fails:
            self._count("fail")
            return _injected(StorageError, errno.EIO, what)
        if is_full:
            self._count("full")
            return _injected(DiskFull, errno.ENOSPC, what)
        return None

    def _damage(self) -> Damage | None:
        where = self._random.random()
        struck = [kind for kind in AT_REST if self._strikes(kind)]
        return Damage(struck[0], where) if struck else None

    def _strikes(self, kind: str) -> bool:
        rate: float = getattr(self._plan, kind)
        return self._random.random() < rate

    def _count(self, kind: str) -> None:
        setattr(self._counts, kind, getattr(self._counts, kind) + 1)


def _injected(error: type[StorageError], code: int, what: str) -> StorageError:
    return error(code, f"{what}: {os.strerror(code)} (injected)")
