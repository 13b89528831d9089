"""Small disk tiers, and disks that fail."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from offload.errors import CorruptChunk
from offload.tiers.disk import DiskTier
from offload.tiers.syscalls import VectoredCall
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout, SlotId
from tests.contracts.tier_contract import WHOLE_PAGES, make_buffers, make_infos

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


def write_records(
    tier: DiskTier, n: int, *, first_id: int = 0, seed: int = 1
) -> tuple[list[SlotId], list[ChunkInfo], list[torch.Tensor]]:
    """Write ``n`` records; return slots, infos and what was written."""
    infos, source = make_infos(n, first_id=first_id), make_buffers(n, WHOLE_PAGES, seed)
    slots = tier.allocate(n)
    tier.write(slots, infos, source).wait(WAIT_S)
    return slots, infos, source


def read_records(tier: DiskTier, slots: list[SlotId], infos: list[ChunkInfo]) -> list[torch.Tensor]:
    out = make_buffers(len(slots), WHOLE_PAGES)
    tier.read(slots, infos, out).wait(WAIT_S)
    return out


def assert_unreadable_and_freeable(
    tier: DiskTier, slots: list[SlotId], infos: list[ChunkInfo]
) -> None:
    num_free = tier.num_free
    for slot, info in zip(slots, infos, strict=True):
        with pytest.raises(CorruptChunk, match="hold no record"):
            read_records(tier, [slot], [info])
    tier.free(slots)
    tier.check_integrity()
    assert tier.num_free == num_free + len(slots)


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
