"""Move blocks between batches and files, and keep the books. Runs on the threads of the disk."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offload.errors import CorruptChunk, OffloadError
from offload.plugins.batch import Batch
from offload.plugins.block_files import BlockFiles
from offload.plugins.slots import Entry, SlotTable
from offload.tiers.io_plan import Operation

_LOG = logging.getLogger(__name__)

Work = Callable[[Batch, Sequence[int], Sequence[Entry], Operation, memoryview], None]
"""One operation for members of a batch and their entries, in the order of the disk."""


@dataclass(slots=True)
class BlockStats:
    """What happened since the store was opened.

    Attributes
    ----------
    num_stored, num_loaded : int
        Blocks that arrived.
    num_evicted, num_corrupt : int
    num_failed : int
        Blocks that the disk refused to write or read.
    num_given_up : int
        Blocks that were not there at the deadline of their batch.
    num_refused : int
        Blocks not stored for want of a slot that nobody uses, or because the disk hangs.
    """

    num_stored: int = 0
    num_loaded: int = 0
    num_evicted: int = 0
    num_corrupt: int = 0
    num_failed: int = 0
    num_given_up: int = 0
    num_refused: int = 0


class Mover:
    """Does the operations of a store of blocks.

    Parameters
    ----------
    files : BlockFiles
    table : SlotTable
    """

    def __init__(self, files: BlockFiles, table: SlotTable) -> None:
        self.lock = threading.Lock()
        """Held for the table and the stats."""
        self.stats = BlockStats()
        self._files = files
        self._table = table
        self._running: dict[int, tuple[float, Batch]] = {}

    def is_hanging(self, deadline_s: float) -> bool:
        """Whether an operation is under way for too long, or was given up and is still under way.

        An operation begins a little after its batch, so the batch may be given up first.
        """
        now = time.monotonic()
        return any(
            batch.is_given_up or now - begun_s > deadline_s
            for begun_s, batch in tuple(self._running.values())
        )

    def run(
        self,
        work: Work,
        batch: Batch,
        members: Sequence[int],
        entries: Sequence[Entry],
        op: Operation,
        scratch: memoryview,
    ) -> None:
        """Do one operation and leave the books in order, whatever happens."""
        thread = threading.get_ident()
        self._running[thread] = time.monotonic(), batch
        try:
            work(batch, members, entries, op, scratch)
        except OffloadError as error:
            _LOG.warning("block store: %s", error)
            with self.lock:
                self.stats.num_failed += len(entries)
                for entry in entries:
                    self._table.forget(entry)
        except BaseException:
            _LOG.exception("block store: a bug; %d blocks are forgotten", len(entries))
            with self.lock:
                for entry in entries:
                    self._table.forget(entry)
            raise
        finally:
            del self._running[thread]
            with self.lock:
                for entry in entries:
                    self._table.release(entry)
            batch.settle(members, arrived=False)

    def store(
        self,
        batch: Batch,
        members: Sequence[int],
        entries: Sequence[Entry],
        op: Operation,
        scratch: memoryview,
    ) -> None:
        """Write blocks; if the batch was given up, none."""
        buffers = self._files.buffers(len(entries))
        pairs = zip(members, buffers, strict=True)
        if not all(batch.take(member, buffer) for member, buffer in pairs):
            with self.lock:
                for entry in entries:
                    self._table.forget(entry)
            return
        self._files.write(op, [entry.key for entry in entries], buffers, scratch)
        with self.lock:
            for entry in entries:
                entry.is_ready = True
            self.stats.num_stored += len(entries)
        batch.settle(members, arrived=True)

    def load(
        self,
        batch: Batch,
        members: Sequence[int],
        entries: Sequence[Entry],
        op: Operation,
        scratch: memoryview,
    ) -> None:
        """Read blocks and hand over those that are sound; if the batch was given up, none."""
        if batch.is_over:
            return
        buffers = self._files.buffers(len(entries))
        try:
            self._files.read(op, [entry.key for entry in entries], buffers, scratch)
        except CorruptChunk as error:
            self._load_each(error, batch, members, entries, op, scratch)
            return
        given = [batch.give(*pair) for pair in zip(members, buffers, strict=True)]
        with self.lock:
            self.stats.num_loaded += sum(given)

    def _load_each(
        self,
        error: CorruptChunk,
        batch: Batch,
        members: Sequence[int],
        entries: Sequence[Entry],
        op: Operation,
        scratch: memoryview,
    ) -> None:
        """Load blocks of which one, at least, is damaged, and set that one aside."""
        if len(entries) > 1:
            size = self._files.fmt.record_bytes
            for number, (member, entry) in enumerate(zip(members, entries, strict=True)):
                one = Operation(op.segment, op.offset + number * size, size, (0,))
                self.load(batch, [member], [entry], one, scratch)
            return
        _LOG.warning("block store: a damaged block is set aside: %s", error)
        with self.lock:
            self.stats.num_corrupt += 1
            self._table.forget(entries[0])
        self._files.quarantine(entries[0].slot, entries[0].key, scratch)
