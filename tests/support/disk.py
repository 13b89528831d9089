"""Small disk tiers, and disks that fail."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from offload.tiers.disk import DiskTier
from offload.tiers.io_engine import VectoredCall
from offload.types import PAGE_BYTES, ChunkLayout

WAIT_S = 30.0
"""Longest wait in a test for something that should happen at once."""


def make_disk_tier(
    directory: Path,
    num_slots: int,
    layout: ChunkLayout,
    *,
    records_per_segment: int = 3,
    num_threads: int = 2,
    deadline_s: float = WAIT_S,
    preadv: VectoredCall = os.preadv,
    pwritev: VectoredCall = os.pwritev,
) -> DiskTier:
    """Return a tier of exactly ``num_slots`` slots."""
    record_bytes = PAGE_BYTES + layout.slot_bytes
    return DiskTier(
        directory,
        capacity_bytes=num_slots * record_bytes,
        layout=layout,
        fingerprint=b"model",
        num_threads=num_threads,
        segment_bytes=records_per_segment * record_bytes,
        deadline_s=deadline_s,
        preadv=preadv,
        pwritev=pwritev,
    )


class FlakyCall:
    """A system call that does what ``before`` does first, while it is armed.

    Parameters
    ----------
    call : callable
        ``os.preadv`` or ``os.pwritev``.
    before : callable
        Gets (buffers, offset); raises, or waits, or returns how many bytes to move at most.
    """

    def __init__(
        self,
        call: VectoredCall,
        before: Callable[[Sequence[memoryview], int], int | None],
        *,
        armed: bool = True,
    ) -> None:
        self.armed = armed
        self._call = call
        self._before = before

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        limit = self._before(buffers, offset) if self.armed else None
        if limit is None:
            return self._call(fd, buffers, offset)
        part = []
        for buffer in buffers:
            part.append(buffer[:limit])
            limit -= len(part[-1])
        return self._call(fd, part, offset)


def fail_with(code: int) -> Callable[[Sequence[memoryview], int], None]:
    """Fail every call."""

    def fail(_: Sequence[memoryview], offset: int) -> None:
        raise OSError(code, os.strerror(code))

    return fail


class Gate:
    """Holds whoever calls it until ``open`` is called."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self._opened.wait(WAIT_S)

    def open(self) -> None:
        """Let everybody through, now and later."""
        self._opened.set()
