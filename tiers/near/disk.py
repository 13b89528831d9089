"""A disk tier that attends: chunks divided by heads among worker processes beside the disks."""

import atexit
import os
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from torch import Tensor

from offload.errors import CapacityError, ClosedError, ConfigError
from offload.tiers.base import Tier
from offload.tiers.near.bus import BusMeter
from offload.tiers.near.call import NearCall
from offload.tiers.near.link import WorkerLink
from offload.tiers.near.member import Member, Row
from offload.tiers.near.messages import Adopt, Ask, Forget, WorkerConfig
from offload.tiers.near.place import WorkerPlace, places
from offload.tiers.near.settings import NearSettings
from offload.tiers.near.sparf_settings import SparF
from offload.tiers.near.tables import Lanes, Slots
from offload.tiers.requests import check_buffers, describe, no_record
from offload.tiers.segment import SegmentTable
from offload.tiers.transfer import FutureTransfer, Transfer
from offload.types import ChunkInfo, ChunkLayout, SlotId

_SEGMENT_BYTES = 1 << 30

_CALL_BYTES = 1 << 20
"""Of a frame for queries and answers; a larger batch takes several."""


class NearDisk(Tier):
    """A tier whose chunks are held by worker processes, which attend over them where they are.

    InstInfer (arXiv 2409.04992) attends inside of storage devices; here a process beside each disk
    does. It keeps what a record holds of its KV heads and, for SparF, its keys a second time,
    channel by channel. When a worker dies another takes over its files, and what was under way is
    asked again; see ``WorkerLink``. A slot must not be freed while a transfer or a call uses it.
    What is not closed is closed at exit, before workers could get in the way of who removes files.

    Parameters
    ----------
    directories : sequence of Path
        One for each disk; made if missing. What is in them goes with the tier.
    capacity_bytes : int
        Hard limit over all of them, header pages, channels and dead records included.
    layout : ChunkLayout
    has_channels : bool
        Whether SparF will be asked for. Takes a quarter more room for 16-bit keys and values.
    settings : NearSettings
    fingerprint : bytes
    deadline_s : float
        Longest wait for room in shared memory.

    Raises
    ------
    ConfigError
        A directory cannot be used, or there are more workers than KV heads.
    StorageError
        A worker does not start.

    Attributes
    ----------
    members : list of Member
        The workers, in the order of their heads.
    bus : BusMeter
        What crosses between them and this process.
    """

    name = "disk"

    def __init__(
        self,
        directories: Sequence[Path],
        *,
        capacity_bytes: int,
        layout: ChunkLayout,
        has_channels: bool = True,
        settings: NearSettings | None = None,
        fingerprint: bytes = b"",
        deadline_s: float = 60.0,
    ) -> None:
        self.settings = NearSettings() if settings is None else settings
        self.capacity_bytes = capacity_bytes
        self.layout = layout
        self.has_channels = has_channels
        self.slot_bytes = layout.slot_bytes
        shares = places(directories, layout, self.settings.workers_per_path)
        self.record_bytes = sum(place.slot_cost(has_channels) for place in shares)
        largest = max(place.record_bytes for place in shares)
        self._table = SegmentTable(
            capacity_bytes // self.record_bytes, max(1, _SEGMENT_BYTES // largest)
        )
        self._deadline_s = deadline_s
        self._lock = threading.RLock()
        self._infos: dict[SlotId, ChunkInfo] = {}
        """What slots are to hold: told to workers that take over, some of which may have written
        their part when others had not."""
        self._stored: set[SlotId] = set()
        """Those that every worker has written."""
        self._checked: dict[int, Slots] = {}
        """Rows as they were last attended to, all of them there; nothing was freed since."""
        self._lanes = Lanes()
        self._forgetting: list[Future[Any]] = []
        self._closed = False
        self.bus = BusMeter()
        self.members: list[Member] = []
        self._own: list[Path] = []
        try:
            for number, place in enumerate(shares):
                self.members.append(self._open(number, place, fingerprint))
        except BaseException:
            self._end_workers()
            raise
        atexit.register(self._close_at_exit, os.getpid())

    @property
    def num_slots(self) -> int:
        """Records the capacity allows, header pages and channels counted."""
        return self._table.num_slots

    @property
    def num_free(self) -> int:
        """Slots that ``allocate`` could hand out now."""
        return self._table.num_slots - self._table.num_used

    @property
    def used_bytes(self) -> int:
        """Bytes of all allocated records and their channels, and of dead ones still on disk."""
        return self._table.num_used * self.record_bytes

    def allocate(self, n: int, stream: int = 0) -> list[SlotId]:
        """Take the next ``n`` positions of the stream's open segment; see ``Tier``."""
        if n > self.num_free:
            self._settle()
        with self._lock:
            self._check_open()
            try:
                return self._table.allocate(n, stream)
            except CapacityError as error:
                raise CapacityError(
                    f"disk tier full: {error} ({self.record_bytes} bytes each)"
                ) from None

    def free(self, slots: Collection[SlotId]) -> None:
        """Give slots back; see ``Tier``. Nothing happens once the tier is closed.

        Workers remove what is dead before they write anything that comes later.
        """
        with self._lock:
            if self._closed or not slots:
                return
            for slot in slots:
                self._infos.pop(slot, None)
            self._stored.difference_update(slots)
            self._checked.clear()
            freed = self._table.free(slots)
            self._forgetting = [future for future in self._forgetting if not future.done()]
        body = Forget(list(slots), freed.holes, freed.dead_segments)
        punched: Counter[int] = Counter()

        def one_done(future: "Future[list[bool]]") -> None:
            if future.exception() is not None:
                return  # the space counts as used until the segment goes
            with self._lock:
                punched.update(i for i, done in enumerate(future.result()) if done)
                for i, hole in enumerate(freed.holes):
                    if punched[i] == len(self.members) and self._table.is_alive(hole.segment):
                        punched[i] = 0
                        self._table.punched(hole)

        for member in self.members:
            future = member.forget(body)
            future.add_done_callback(one_done)
            self._forgetting.append(future)

    def read(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], out: Sequence[Tensor]
    ) -> Transfer:
        """Fetch whole chunks; see ``Tier``."""
        check_buffers(slots, infos, out, self.slot_bytes)
        what, num_bytes = describe(self.name, "read", infos), len(slots) * self.slot_bytes
        lost = self._missing(slots)
        if lost:
            failed: Future[None] = Future()
            failed.set_exception(no_record(what, lost, len(slots)))
            return FutureTransfer(what, num_bytes, [failed])
        futures = [future for each in self.members for future in each.read(what, slots, infos, out)]
        return FutureTransfer(what, num_bytes, futures)

    def write(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], src: Sequence[Tensor]
    ) -> Transfer:
        """Hand chunks to the workers; see ``Tier``."""
        check_buffers(slots, infos, src, self.slot_bytes)
        what = describe(self.name, "write", infos)
        left = [len(self.members)] * len(slots)
        with self._lock:
            self._check_open()
            self._stored.difference_update(slots)
            self._infos |= zip(slots, infos, strict=True)
            self._checked.clear()
            lanes = self._lanes.of_all([(info.layer, info.first_token) for info in infos])

        def stored(part: range) -> None:
            with self._lock:
                for i in part:
                    left[i] -= 1
                    if not left[i]:
                        self._stored.add(slots[i])

        futures = [
            future
            for each in self.members
            for future in each.write(what, slots, infos, lanes, src, stored)
        ]
        return FutureTransfer(what, len(slots) * self.slot_bytes, futures)

    def attend(
        self, query: Tensor, rows: Sequence[Row], scale: float, how: SparF | None = None
    ) -> NearCall:
        """Begin to attend over chunks where they are.

        Parameters
        ----------
        query : Tensor, shape (num_rows, num_heads, key_dim)
            In host memory, of any floating dtype; as the model has it.
        rows : sequence of Row
            What each row is to attend to.
        scale : float
        how : SparF or None
            None attends to every token.

        Returns
        -------
        NearCall
            Its ``wait`` returns the answers.

        Raises
        ------
        CorruptChunk
            A slot holds no record.
        """
        for name, slots in rows:
            if self._checked.get(name) is not slots:
                lost = self._missing(slots.tolist())
                if lost:
                    raise no_record("disk attend", lost, len(slots))
                self._checked[name] = slots
        heads = self.layout.num_kv_heads
        parts = [
            list(each.attend(each.place.queries_of(query, heads), rows, scale, how))
            for each in self.members
        ]
        return NearCall(f"disk attend of {len(rows)} rows", parts)

    def forget_rows(self, names: Sequence[int]) -> None:
        """Tell the workers that some rows will not be asked about again."""
        with self._lock:
            if self._closed or not names:
                return
        for member in self.members:
            member.forget(Forget([], rows=list(names)))

    def counters(self) -> dict[str, int]:
        """Return the sums of the workers' counters."""
        asked = [each.link.ask("disk: counters", lambda _: Ask()) for each in self.members]
        total: Counter[str] = Counter()
        for future in asked:
            total.update(future.result(self._deadline_s))
        return dict(total)

    def check_integrity(self) -> None:
        """Raise AssertionError if the invariant does not hold."""
        self._settle()
        with self._lock:
            self._table.check_integrity()
            assert self._stored <= self._infos.keys()
            assert all(self._table.holds(slot) for slot in self._infos)
            assert self.used_bytes <= self.capacity_bytes

    def close(self) -> None:
        """End the workers and remove their files; what is in flight fails. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self._close_at_exit)
        self._end_workers()
        self._table = SegmentTable(0, self._table.records_per_segment)
        self._infos.clear()
        self._stored.clear()

    def _close_at_exit(self, owner_pid: int) -> None:
        if os.getpid() == owner_pid:  # a fork has no workers
            self.close()

    def _open(self, number: int, place: WorkerPlace, fingerprint: bytes) -> Member:
        directory = place.directory / f"worker-{number}"
        try:
            directory.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise ConfigError(f"cannot make {directory}: {error.strerror}") from error
        self._own.append(directory)
        settings, frame_bytes = self.settings, place.layout.slot_bytes
        config = WorkerConfig(
            name=f"storage worker {number} on {place.directory}",
            directory=directory,
            token=secrets.token_hex(4),
            layout=place.layout,
            fingerprint=fingerprint,
            has_channels=self.has_channels,
            block_tokens=settings.block_tokens,
            memory_bytes=settings.memory_bytes,
            frame_bytes=frame_bytes,
            num_frames=max(2, settings.shared_bytes // frame_bytes),
            call_bytes=_CALL_BYTES,
            num_calls=4,
            num_threads=settings.num_threads,
            cpus=settings.cpus_of(number),
            deadline_s=self._deadline_s,
        )
        link = WorkerLink(config, self._records, settings.patience_s)
        return Member(place, link, self.bus, self._deadline_s)

    def _records(self) -> Adopt:
        """Return what a worker that takes over has to know."""
        with self._lock:
            return Adopt(list(self._infos), list(self._infos.values()))

    def _missing(self, slots: Sequence[SlotId]) -> list[SlotId]:
        with self._lock:
            self._check_open()
            return [slot for slot in slots if slot not in self._stored]

    def _settle(self) -> None:
        """Wait until workers have given back what was freed."""
        with self._lock:
            forgetting = list(self._forgetting)
        wait(forgetting, self._deadline_s)

    def _end_workers(self) -> None:
        for member in self.members:
            member.close()
        for directory in self._own:
            shutil.rmtree(directory, ignore_errors=True)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the disk tier is closed")
