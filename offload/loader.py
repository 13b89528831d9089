"""Fill staging buffers with chunks from whatever tier holds them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from offload.errors import TransferTimeout
from offload.prefetch.plan import LoadGroup
from offload.store import ChunkStore
from offload.table import Entry
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import page_aligned
from offload.tiers.pooled import PooledTier
from offload.tiers.transfer import FutureTransfer, Transfer
from offload.types import ChunkId, ChunkInfo, SlotId


class StagingLoader:
    """Loads groups of chunks into numbered staging buffers on the device.

    Disk records are read by the disk tier's threads, straight into the buffer where the device is
    the CPU, else into a page-locked mirror of it; one load thread copies what lies in memory, waits
    for the disk, and moves the mirror up on a stream of its own. On a CUDA device compute waits for
    the load by event, and a load waits by event until compute has let go of the buffer.

    Parameters
    ----------
    store : ChunkStore
    num_buffers, buffer_chunks : int
        The ring: so many buffers of so many slots.
    device : torch.device
    """

    def __init__(
        self, store: ChunkStore, num_buffers: int, buffer_chunks: int, device: torch.device
    ) -> None:
        shape = (num_buffers, buffer_chunks, store.layout.slot_bytes)
        num_bytes = num_buffers * buffer_chunks * store.layout.slot_bytes
        self._store = store
        self._streams = _Streams(device, num_buffers)
        if device.type == "cpu":
            self.buffers = self._mirror = page_aligned(num_bytes).view(shape)
        else:
            self.buffers = torch.empty(shape, dtype=torch.uint8, device=device)
            self._mirror = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        # Views of slots, made once: making them takes as long as all else it takes to start a load.
        self._targets = [buffer.unbind() for buffer in self.buffers]
        self._mirrors = [buffer.unbind() for buffer in self._mirror]
        self._is_closing = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="offload-load")

    @property
    def num_bytes(self) -> int:
        """Bytes of staging on the device."""
        return self.buffers.numel()

    def start(self, group: LoadGroup, buffer: int) -> Transfer:
        """Begin to fill a buffer with a group; see ``prefetch.stream.Loader``."""
        unique = list(dict.fromkeys(group.chunks))
        self._store.table.protect(unique)
        try:
            future = self._submit(group.chunks, buffer)
        except BaseException:
            self._store.unprotect(unique)
            raise
        first = self._store.table[group.chunks[0]].info
        what = f"load of {len(unique)} chunks of layer {first.layer} from token {first.first_token}"
        num_bytes = len(unique) * self._store.layout.slot_bytes
        return FutureTransfer(what, num_bytes, [future], lambda: self._streams.join(buffer))

    def release(self, group: LoadGroup, buffer: int, *, used: bool) -> None:
        """Let go of a buffer, offering its chunks to faster tiers that have room meanwhile."""
        unique = list(dict.fromkeys(group.chunks))
        self._store.unprotect(unique)
        if used:
            self._streams.mark_used(buffer)
            self._store.touch(unique)
            self._promote(group, buffer)

    def close(self) -> None:
        """Wait for what is in flight and stop the load thread. Idempotent."""
        self._is_closing = True
        self._executor.shutdown(wait=True)

    def _submit(self, chunks: tuple[ChunkId, ...], buffer: int) -> "Future[None]":
        """Sort the rows of the buffer by where their bytes are, and start."""
        self._streams.before_load(buffer)
        target, mirror = self._targets[buffer], self._mirrors[buffer]
        copies: list[tuple[Tensor, Tensor]] = []
        lifts: list[tuple[Tensor, Tensor]] = []
        from_codes: list[Callable[[], object]] = []
        from_disk: list[tuple[Entry, Tensor]] = []
        repeats: list[tuple[Tensor, Tensor]] = []
        first_row: dict[ChunkId, int] = {}
        for row, chunk in enumerate(chunks):
            seen = first_row.setdefault(chunk, row)
            if seen != row:
                repeats.append((target[row], target[seen]))
                continue
            entry = self._store.table[chunk]
            memory = self._memory_of(entry)
            if isinstance(memory, Tensor):
                copies.append((target[row], memory))
                continue
            if memory is not None:
                from_codes.append(partial(memory, mirror[row]))
            elif entry.pending is None:
                from_disk.append((entry, mirror[row]))
            else:
                # Copied now: the write buffer goes to another chunk once its store has ended.
                mirror[row].copy_(entry.pending)
            lifts.append((target[row], mirror[row]))
        reading = self._read_disk(from_disk)

        def fill() -> None:
            with self._streams.loading(buffer):
                _copy(copies)
                for decode in from_codes:
                    decode()
                self._wait_for_disk(reading)
                if self.buffers is not self._mirror:
                    _copy(lifts)
                _copy(repeats)

        return self._executor.submit(fill)

    def _memory_of(self, entry: Entry) -> Tensor | Callable[[Tensor], object] | None:
        """Return the bytes of a chunk in memory, or what decodes them into a buffer; None: neither.

        Of the fastest tier that has it; counts the move.
        """
        for level, tier in enumerate(self._store.tiers):
            if level in entry.slots and isinstance(tier, PooledTier):
                self._store.counters.add_loaded(tier.name, tier.slot_bytes)
                slot = entry.slots[level]
                if isinstance(tier, MemoryTier):
                    return tier.buffer(slot)
                return partial(_decode, tier, slot, entry.info)
        return None

    def _read_disk(self, wanted: Sequence[tuple[Entry, Tensor]]) -> Transfer | None:
        if not wanted:
            return None
        level = len(self._store.tiers) - 1
        tier = self._store.tiers[level]
        self._store.counters.add_loaded(tier.name, len(wanted) * tier.slot_bytes)
        return tier.read(
            [entry.slots[level] for entry, _ in wanted],
            [entry.info for entry, _ in wanted],
            [row for _, row in wanted],
        )

    def _wait_for_disk(self, reading: Transfer | None) -> None:
        """Wait as long as it takes: until the disk is done, the buffer is not free for others.

        Who waits for the load has a deadline of its own; ``close`` alone makes this one end.
        """
        while reading is not None:
            try:
                reading.wait(self._store.deadline_s)
            except TransferTimeout:
                if self._is_closing:
                    raise
            else:
                return

    def _promote(self, group: LoadGroup, buffer: int) -> None:
        store = self._store
        for level, tier in enumerate(store.tiers):
            if not isinstance(tier, PooledTier) or not tier.num_free:
                continue
            on_device = tier.pool.slab.device.type != "cpu"
            rows = (self.buffers if on_device else self._mirror)[buffer]
            for row, chunk in enumerate(group.chunks):
                if not tier.num_free:
                    break
                if chunk in store.table and store.level_of(chunk) > level:
                    store.promote(chunk, level, rows[row])


class _Streams:
    """Orders loads with compute on a CUDA device; on the CPU there is nothing to order."""

    def __init__(self, device: torch.device, num_buffers: int) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._load = torch.cuda.Stream(device)
            self._used = [torch.cuda.Event() for _ in range(num_buffers)]
            self._filled = [torch.cuda.Event() for _ in range(num_buffers)]

    def mark_used(self, buffer: int) -> None:
        if self._cuda:
            self._used[buffer].record()

    def before_load(self, buffer: int) -> None:
        """Make the load stream wait for compute, and for stores into the slots it will read."""
        if self._cuda:
            self._filled[buffer].synchronize()  # the mirror may still be on its way up
            self._load.wait_event(self._used[buffer])
            self._load.wait_stream(torch.cuda.current_stream())

    @contextmanager
    def loading(self, buffer: int) -> Iterator[None]:
        """Queue what runs inside on the load stream."""
        if not self._cuda:
            yield
            return
        with torch.cuda.stream(self._load):
            yield
            self._filled[buffer].record(self._load)

    def join(self, buffer: int) -> None:
        """Make compute wait for the load."""
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._filled[buffer])


def _decode(tier: PooledTier, slot: SlotId, info: ChunkInfo, out: Tensor) -> None:
    tier.read([slot], [info], [out])


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)
