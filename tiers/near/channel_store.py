"""The second copy of K of one storage-side worker: channel-major, int8; it steers selection."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor

from offload.errors import ConfigError
from offload.tiers.near.channel_block import BadBlocks, Block, BlockFormat, Floats, Ints, Lane
from offload.tiers.near.channel_file import BlockFiles
from offload.tiers.near.channel_runs import RunReader, Runs
from offload.tiers.near.channel_table import COLUMN_BITS, ChannelTable, Found
from offload.tiers.near.channel_writer import TailWriter
from offload.tiers.near.piece_cache import PieceCache
from offload.tiers.read_meter import ReadMeter
from offload.tiers.syscalls import VectoredCall
from offload.types import ChunkLayout

_BATCH = 16
"""Chunks encoded at a time: enough to make a call cheap, and little temporary memory."""


class ChannelStore:
    """Keys of many chunks by channel: blocks in files, and in memory the tails of the lanes.

    A tail of ``block_tokens`` becomes the next block of its lane, by the thread that filled it.
    Blocks never change; one in which no chunk is alive is removed. What is held only steers
    selection: whoever misses a chunk (``Found.missing``) adds it again from its record.

    A slot is never used for another chunk. Dead slots of living blocks are held again by the next
    store of the token, until ``retain`` or ``forget`` tells it. Any thread may call any method;
    after ``close`` most raise ClosedError.

    Parameters
    ----------
    directory : Path
        Made if it is missing. Blocks of the same token that are there are found again; one store at
        a time may use a token.
    layout : ChunkLayout
        Of the chunks; its heads are those of the worker.
    token : str
        1 to 32 letters, digits, ``-`` and ``_``.
    block_tokens : int
        Tokens of a full block, at least one chunk.
    memory_bytes : int
        Limit of all tails, and of runs that were read and are kept in what room the tails leave. At
        the limit the longest tail is written short; if that fails, the oldest one is dropped. On
        top come twice the block being written, and what threads read or still use.
    cache : PieceCache, optional
        Of ``memory_bytes``, whose pieces are as long as runs; keys that are negative are others'.
    preadv, pwritev : callable
        The system calls; replaceable to see what a failing disk does.

    Attributes
    ----------
    meter : ReadMeter
        Counts what ``read`` has read from files.

    Raises
    ------
    ConfigError
        The directory or token cannot be used, or a number is too small or too large.
    """

    def __init__(
        self,
        directory: Path,
        layout: ChunkLayout,
        *,
        token: str,
        block_tokens: int = 8192,
        memory_bytes: int = 256 << 20,
        cache: PieceCache | None = None,
        preadv: VectoredCall = os.preadv,
        pwritev: VectoredCall = os.pwritev,
    ) -> None:
        codes_bytes = layout.num_kv_heads * layout.key_dim * layout.chunk_tokens
        self._chunk_bytes = codes_bytes + 4 * layout.num_kv_heads * layout.row_dim
        max_chunks = memory_bytes // self._chunk_bytes
        block_chunks = block_tokens // layout.chunk_tokens
        if max_chunks < 1 or not 0 < block_chunks < 1 << COLUMN_BITS:
            raise ConfigError(
                f"blocks of {block_tokens} tokens and {memory_bytes} bytes of memory: a chunk has "
                f"{layout.chunk_tokens} tokens and {self._chunk_bytes} bytes, and a block fewer "
                f"than {1 << COLUMN_BITS} chunks"
            )
        self._files = BlockFiles(directory, BlockFormat(layout, token), pwritev)
        self.meter = ReadMeter()
        self._table = ChannelTable(layout)
        self._memory_bytes = memory_bytes
        self._cache = cache or PieceCache(memory_bytes, block_chunks * layout.chunk_tokens)
        self._reader = RunReader(self._files, self._cache, preadv, self.meter)
        blocks, self._num_damaged = self._files.recover()
        for block in blocks:
            self._files.unlink(self._table.hold(block, range(len(block.slots))))
        number = blocks[-1].number + 1 if blocks else 0
        limits = (max_chunks, block_chunks)
        self._writer = TailWriter(self._table, self._files, number, *limits, self._fit)

    @property
    def slots(self) -> list[int]:
        """Every slot that is held."""
        with self._table.lock:
            return self._table.slots

    def has(self, slot: int) -> bool:
        """Return whether a slot is held."""
        return slot in self._table

    def stats(self) -> dict[str, int]:
        """Return what is held now, and what has happened.

        Returns
        -------
        dict
            ``blocks`` and ``disk_bytes`` of files; ``tail_bytes`` and ``kept_bytes`` of runs in
            memory; runs that were there when they were needed, ``hits``, or not, ``misses``; chunks
            ``dropped`` (with bad blocks, or at the limit on memory) and ``rebuilt`` of those;
            ``damaged`` files found at the start; ``failed`` attempts to write a block.
        """
        with self._table.lock:
            files = self._table.files
            return {
                "blocks": len(files),
                "disk_bytes": sum(self._files.fmt.file_bytes(len(file.slots)) for file in files),
                "tail_bytes": self._table.num_in_memory * self._chunk_bytes,
                "kept_bytes": self._cache.num_bytes,
                "hits": self._cache.num_hits,
                "misses": self._cache.num_misses,
                "dropped": self._table.num_dropped,
                "rebuilt": self._table.num_rebuilt,
                "damaged": self._num_damaged,
                "failed": self._writer.num_failed,
            }

    def add(
        self, slots: Sequence[int], lanes: Lane | Sequence[Lane], keys: Tensor, value_sums: Floats
    ) -> None:
        """Hold chunks, unless they are held already.

        A block that cannot be written stays in memory, where it is read; it is tried again when
        more chunks come to its lane.

        Parameters
        ----------
        slots : sequence of int
            n of them, not negative.
        lanes : tuple of int, or a sequence of them
            Layer and row of the batch, of all or of each; -1 if it is not known.
        keys : Tensor, shape (n, num_kv_heads, chunk_tokens, key_dim), on the CPU
        value_sums : ndarray, float32 [n, num_kv_heads, value_dim]
            Sum of V over the tokens of each chunk.
        """
        self._writer.check_open()
        each = _of_each(lanes, len(slots))
        for first in range(0, len(slots), _BATCH):
            part = slice(first, first + _BATCH)
            self._writer.add(slots[part], each[part], keys[part], value_sums[part])

    def find(self, slots: Ints, known: Found | None = None) -> Found:
        """Look chunks up.

        Parameters
        ----------
        slots : ndarray, int64 [n]
        known : Found, optional
            An earlier answer. If nothing has moved since and it missed nothing, slots that it
            begins with are not looked up again; the same slots give the same object.
        """
        with self._table.lock:
            self._writer.check_open()
            return self._table.find(slots, known)

    def read(self, found: Found, channels: Ints) -> Runs:
        """Read the codes of some channels, of every block in which chunks were found.

        Parameters
        ----------
        found : Found
        channels : ndarray, int64 [num_kv_heads, r]
            Of each head, at least one, in ascending order.

        Returns
        -------
        Runs
            In memory that the next ``read`` of the same thread overwrites. Close it.

        Raises
        ------
        BadBlocks
            Some blocks are not what was written, or cannot be read (a CorruptChunk). They are
            dropped: look again, add what is missing then, and read again.
        StorageError
            A file cannot be opened.
        """
        with self._table.lock:
            self._writer.check_open()
            self._fit(self._table.num_in_memory)
        try:
            runs = self._reader.read(found, channels)
        except BadBlocks as error:
            for number in error.numbers:
                self.drop(number)
            raise
        with self._table.lock:  # blocks that went meanwhile leave nothing
            gone = [block for block in found.blocks if self._table.block(block.number) is None]
        self._drop_runs(gone)
        return runs

    def means(self, found: Found) -> Floats:
        """Return the mean of V over the chunks that were found.

        One mean is kept of a block. Where only some of its chunks were asked for it counts in
        proportion to their number: an estimate, like all that this mean is used for.

        Returns
        -------
        ndarray, float32 [num_kv_heads, value_dim]
            Zero if none was found.
        """
        weights = np.bincount(found.block[found.block >= 0])
        share = (weights / max(1, weights.sum())).astype(np.float32)
        means: Floats = np.tensordot(share, found.value_means, 1)
        return means

    def forget(self, slots: Collection[int]) -> None:
        """Let go of dead chunks, and remove blocks of which a third or more is dead.

        What was alive in them is missing from then on, and copied once more when it is looked for.

        Parameters
        ----------
        slots : collection of int
            Those that are not held are ignored.

        Raises
        ------
        StorageError
            A file cannot be removed.
        """
        with self._table.lock:
            self._writer.check_open()
            thin = self._table.thin(slots)
            dead = self._table.release(slots)
            left = [block for block in thin if self._table.block(block.number) is not None]
            dead += self._table.give_up(left)
        self._remove(dead)

    def retain(self, slots: Collection[int]) -> None:
        """Forget everything but these; says after a restart which slots are alive."""
        self.forget(set(self.slots).difference(slots))

    def drop(self, block: int) -> None:
        """Give up a block, if it is still there; its chunks are missing from now on.

        Raises
        ------
        StorageError
            The file cannot be removed.
        """
        with self._table.lock:
            self._writer.check_open()
            there = self._table.block(block)
            dead = [] if there is None else self._table.give_up([there])
        self._remove(dead)

    def flush(self) -> None:
        """Write every tail, however short.

        Raises
        ------
        DiskFull
        StorageError
            A tail could not be written, and is still in memory; so may be others.
        """
        self._writer.check_open()
        self._writer.flush()

    def close(self, *, remove: bool = False) -> None:
        """Let go of everything; tails that were not flushed are gone. Idempotent.

        Parameters
        ----------
        remove : bool
            Remove the files, too. Otherwise the next store of the token finds them.

        Raises
        ------
        StorageError
            A file cannot be removed.
        """
        self._writer.close()
        with self._table.lock:
            dead = self._table.release(self._table.slots)
        self._drop_runs(dead)
        self._files.unlink(dead if remove else [])

    def check_integrity(self) -> None:
        """Raise AssertionError if the books do not balance."""
        with self._table.lock:
            self._table.check_integrity()
            stats_bytes = self._table.num_in_memory * self._chunk_bytes
        self._cache.check_integrity()
        assert stats_bytes + self._cache.num_bytes <= self._memory_bytes

    def _fit(self, num_in_memory: int) -> None:
        """Leave tails of so many chunks their room; the caller has the lock of the table."""
        self._cache.limit(self._memory_bytes - num_in_memory * self._chunk_bytes)

    def _remove(self, dead: Collection[Block]) -> None:
        self._drop_runs(dead)
        self._files.unlink(dead)

    def _drop_runs(self, dead: Collection[Block]) -> None:
        num_runs = self._files.fmt.num_runs
        for block in dead:
            self._cache.drop(range(block.number * num_runs, (block.number + 1) * num_runs))


def _of_each(lanes: Lane | Sequence[Lane], count: int) -> Sequence[Lane]:
    if len(lanes) == 2 and isinstance(lanes[0], int):
        return [cast("Lane", lanes)] * count
    return cast("Sequence[Lane]", lanes)
