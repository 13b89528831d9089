"""From chunks to tails, and from tails to blocks in files."""

import itertools
import logging
import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from offload.errors import ClosedError, StorageError
from offload.tiers.near.channel_block import Block, Floats, Lane
from offload.tiers.near.channel_encode import encode_chunks
from offload.tiers.near.channel_file import BlockFiles
from offload.tiers.near.channel_table import ChannelTable

_LOG = logging.getLogger(__name__)


class TailWriter:
    """Keeps tails below their limit. Any thread may call any method.

    One block is written at a time; who has filled another tail meanwhile waits, so that memory does
    not grow where the disk cannot keep up. While a block is written, its chunks are in the tail.

    Parameters
    ----------
    table : ChannelTable
    files : BlockFiles
    first_number : int
        Of the next block; those after it are higher.
    max_chunks : int
        Of all tails.
    block_chunks : int
        Of a full block.
    fit : callable
        Called, with the table locked, before there are so many chunks in memory.

    Attributes
    ----------
    num_failed : int
        Blocks that could not be written.
    is_closed : bool
    """

    def __init__(
        self,
        table: ChannelTable,
        files: BlockFiles,
        first_number: int,
        max_chunks: int,
        block_chunks: int,
        fit: Callable[[int], None],
    ) -> None:
        self.num_failed = 0
        self.is_closed = False
        self._table = table
        self._files = files
        self._numbers = itertools.count(first_number)
        self._max_chunks = max_chunks
        self._block_chunks = block_chunks
        self._fit = fit
        self._writing = threading.Lock()
        """Taken before the lock of the table."""

    def add(
        self, slots: Sequence[int], lanes: Sequence[Lane], keys: Tensor, value_sums: Floats
    ) -> None:
        """Put a few chunks into tails, and write those that are full; see ``ChannelStore.add``."""
        fresh = [index for index, slot in enumerate(slots) if slot not in self._table]
        if not fresh:
            return
        slots, lanes = [slots[index] for index in fresh], [lanes[index] for index in fresh]
        blocks = encode_chunks(self._numbers, slots, lanes, keys[fresh], value_sums[fresh])
        for block in blocks:
            while not self._append(block):
                self._make_room()
        for lane in dict.fromkeys(lanes):
            self._write_full(lane)

    def flush(self) -> None:
        """Write what is in memory now; see ``ChannelStore.flush``."""
        with self._writing:
            with self._table.lock:
                lengths = {lane: len(self._table.tail(lane)) for lane in self._table.lanes}
            for lane, length in lengths.items():
                for _ in range(0, length, self._block_chunks):
                    self._write(lane)

    def close(self) -> None:
        """Wait for the block that is being written, and take no more. Idempotent."""
        with self._writing, self._table.lock:
            self.is_closed = True

    def check_open(self) -> None:
        """Raise ClosedError after ``close``."""
        if self.is_closed:
            raise ClosedError("the store of channel blocks is closed")

    def _append(self, block: Block) -> bool:
        with self._table.lock:
            self.check_open()
            if block.slots[0] in self._table:
                return True
            if self._table.num_in_memory >= self._max_chunks:
                return False
            self._fit(self._table.num_in_memory + 1)
            self._table.hold(block, [0])
            return True

    def _write_full(self, lane: Lane) -> None:
        """Write the tail of a lane for as long as it fills a block; one that fails stays."""
        while self._is_full(lane):
            with self._writing:
                if not self._is_full(lane):
                    return
                try:
                    self._write(lane)
                except StorageError as error:
                    _LOG.warning("%s; the keys stay in memory", error)
                    return

    def _make_room(self) -> None:
        """Write the longest tail short; if that fails, drop the oldest one."""
        with self._writing:
            with self._table.lock:
                if self._table.num_in_memory < self._max_chunks:
                    return
                lane = self._table.longest_tail()
            try:
                self._write(lane)
            except StorageError as error:
                with self._table.lock:
                    oldest = self._table.oldest_tail()
                    self._table.give_up(oldest)
                _LOG.warning("%s; dropped the channels of %d chunks", error, len(oldest))

    def _is_full(self, lane: Lane) -> bool:
        with self._table.lock:
            return len(self._table.tail(lane, self._block_chunks)) == self._block_chunks

    def _write(self, lane: Lane) -> None:
        """Write the beginning of a tail; the caller has ``_writing``."""
        with self._table.lock:
            parts = self._table.tail(lane, self._block_chunks)
        if not parts:
            return
        try:
            block = self._files.write(next(self._numbers), parts)
        except StorageError:
            self.num_failed += 1
            raise
        with self._table.lock:
            dead = self._table.move(parts, block)
        self._files.unlink(dead)
