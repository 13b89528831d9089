"""Read runs, the codes of single channels, of many blocks at once."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from offload.errors import StorageError
from offload.kernels.xxh3 import checksums
from offload.tiers.aio import thread_queue
from offload.tiers.near.channel_block import BadBlocks, Block, Floats, Ints
from offload.tiers.near.channel_file import BlockFiles
from offload.tiers.near.channel_table import Found
from offload.tiers.near.extents import Extents, plan_reads
from offload.tiers.near.piece_cache import PieceCache
from offload.tiers.near.scratch_memory import thread_memory
from offload.tiers.read_meter import ReadMeter
from offload.tiers.syscalls import VectoredCall, read_fully

_MAX_OPEN = 128
"""Files of one thread that are open at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Codes of some channels of some blocks, in use until ``close``.

    Attributes
    ----------
    addresses : ndarray, int64 [B, num_kv_heads, r]
        Of the first code of each run. Valid as long as this object lives and until the thread that
        read them reads again.
    scales : ndarray, float32 [B, num_kv_heads, r]
        Times a code, they give the key.
    bytes_read : int
        From files.
    num_reads : int
        In which they came.
    found : Found
        Holds the codes of tails.
    memory : Tensor, uint8
        Holds those that were read.
    cache : PieceCache
        Holds those that were read before, at ``places``.
    """

    addresses: Ints
    scales: Floats
    bytes_read: int
    num_reads: int
    found: Found
    memory: Tensor
    cache: PieceCache
    places: Ints

    def close(self) -> None:
        """Say, once, that nothing of it is needed any more."""
        self.cache.give_back(self.places)


class RunReader:
    """Reads runs and verifies them. Any thread may call; each has memory of its own.

    Parameters
    ----------
    files : BlockFiles
    cache : PieceCache
        Of runs that were read and verified, by block and run.
    preadv : callable
    meter : ReadMeter
    """

    def __init__(
        self, files: BlockFiles, cache: PieceCache, preadv: VectoredCall, meter: ReadMeter
    ) -> None:
        self._files = files
        self._cache = cache
        self._preadv = preadv
        self._meter = meter

    def read(self, found: Found, channels: Ints) -> Runs:
        """Read runs of all blocks; see ``ChannelStore.read``."""
        num_blocks, heads, dim = found.scales.shape
        runs = (channels + dim * np.arange(heads)[:, None]).reshape(-1)
        scales = found.scales.reshape(num_blocks, heads * dim)[:, runs]
        addresses = (found.starts[:, None] + found.run_bytes[:, None] * runs).reshape(-1)
        numbers = np.array([block.number for block in found.blocks], np.int64)
        keys = (numbers[:, None] * (heads * dim) + runs).reshape(-1)
        in_files = np.flatnonzero(np.repeat(found.is_file, len(runs)))
        places = self._cache.take(keys[in_files])
        is_there = places >= 0
        places, missed = places[is_there], in_files[~is_there]
        addresses[in_files[is_there]] = self._cache.address(places)
        try:
            memory, extents = self._read_missed(found, addresses, runs, missed)
            lengths = np.repeat(found.run_bytes, len(runs))[missed]
            self._cache.keep(keys[missed], addresses[missed], lengths)
        except BaseException:
            self._cache.give_back(places)
            raise
        shape = (num_blocks, *channels.shape)
        return Runs(
            addresses.reshape(shape),
            scales.reshape(shape),
            int(extents.num_bytes.sum()),
            len(extents.offsets),
            found,
            memory,
            self._cache,
            places,
        )

    def _read_missed(
        self, found: Found, addresses: Ints, runs: Ints, missed: Ints
    ) -> tuple[Tensor, Extents]:
        """Read some runs and put where they are in place of where they were."""
        block, run = np.divmod(missed, max(1, len(runs)))
        lengths = found.run_bytes[block]
        extents, offsets = plan_reads(block, addresses[missed], lengths)
        bytes_read = int(extents.num_bytes.sum())
        memory = thread_memory("channel runs", bytes_read)
        if len(missed):
            for first in range(0, len(found.blocks), _MAX_OPEN):
                self._read(found.blocks, first, extents, memory)
            self._meter.add(bytes_read, len(extents.offsets))
            addresses[missed] = memory.data_ptr() + offsets
            self._verify(found.blocks, block, runs[run], addresses[missed], lengths)
        return memory, extents

    def _read(self, blocks: Sequence[Block], first: int, extents: Extents, memory: Tensor) -> None:
        """Read the extents of at most ``_MAX_OPEN`` blocks."""
        here = slice(*np.searchsorted(extents.file, [first, first + _MAX_OPEN]))
        block, offsets, num_bytes, places = (each[here] for each in extents)
        with ExitStack() as stack:
            fds = np.full(_MAX_OPEN, -1, np.int64)
            for index in np.unique(block).tolist():
                fds[index - first] = fd = self._open(blocks[index])
                stack.callback(os.close, fd)
            queue = thread_queue() if self._files.is_direct else None
            if queue is not None and self._preadv is os.preadv:
                own = fds[block - first]
                if queue.read(own, offsets, memory.data_ptr() + places, num_bytes):
                    return
            into = memory.numpy().data
            rows = np.stack([block, offsets, num_bytes, places], axis=1).tolist()
            for index, offset, length, place in rows:
                file = str(self._files.path(blocks[index].number))
                piece = into[place : place + length]
                try:
                    read_fully(int(fds[index - first]), [piece], offset, file, self._preadv)
                except StorageError as error:
                    raise BadBlocks(f"{error}", [blocks[index].number]) from error

    def _open(self, block: Block) -> int:
        try:
            return self._files.open(block.number)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise BadBlocks(f"{error}", [block.number]) from error
            raise

    def _verify(
        self, blocks: Sequence[Block], block: Ints, runs: Ints, addresses: Ints, run_bytes: Ints
    ) -> None:
        own = np.empty(len(block), np.uint64)
        for length in set(run_bytes.tolist()):
            alike = run_bytes == length
            own[alike] = checksums(addresses[alike], length)
        bad: dict[int, str] = {}
        for index in np.unique(block).tolist():
            here = np.flatnonzero(block == index)
            stored = blocks[index].checksums.reshape(-1)[runs[here]]
            for i in np.flatnonzero(own[here] != stored)[:1].tolist():
                head, channel = divmod(int(runs[here[i]]), blocks[index].scales.shape[1])
                what = f"head {head}, channel {channel}: {own[here[i]]:016x}, the header says"
                bad[index] = f"{what} {stored[i]:016x}"
        if bad:
            numbers = [blocks[index].number for index in bad]
            raise BadBlocks(
                f"{self._files.path(numbers[0])}: {len(bad)} of {len(blocks)} blocks have a wrong "
                f"checksum, first block {numbers[0]}, {next(iter(bad.values()))}",
                numbers,
            )
