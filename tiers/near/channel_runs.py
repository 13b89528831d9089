"""Read runs, the codes of single channels, of many blocks at once."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offload.errors import StorageError
from offload.kernels.xxh3 import checksums
from offload.tiers.aio import thread_queue
from offload.tiers.near.channel_block import BadBlocks, Block, Floats, Ints
from offload.tiers.near.channel_file import BlockFiles
from offload.tiers.near.channel_table import Found
from offload.tiers.near.scratch_memory import thread_memory
from offload.tiers.read_meter import ReadMeter
from offload.tiers.syscalls import VectoredCall, read_fully
from offload.types import PAGE_BYTES

_MAX_OPEN = 128
"""Files of one thread that are open at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Codes of some channels of some blocks.

    Attributes
    ----------
    addresses : ndarray, int64 [B, num_kv_heads, r]
        Of the first code of each run. Valid as long as this object lives and until the thread that
        read them reads again.
    scales : ndarray, float32 [B, num_kv_heads, r]
        Times a code, they give the key.
    bytes_read : int
        From files.
    found : Found
        Holds the codes that are in memory.
    memory : Tensor, uint8
        Holds those that were read.
    """

    addresses: Ints
    scales: Floats
    bytes_read: int
    found: Found
    memory: Tensor


class Extents(NamedTuple):
    """Pages to read: runs of one block that share pages, or whose pages follow each other.

    Attributes
    ----------
    block, offsets, num_bytes, places : ndarray, int64 [num_extents]
        In which file, where, how long, and where in memory; in the order of the files.
    """

    block: Ints
    offsets: Ints
    num_bytes: Ints
    places: Ints


class RunReader:
    """Reads runs and verifies them. Any thread may call; each has memory of its own.

    Parameters
    ----------
    files : BlockFiles
    preadv : callable
    meter : ReadMeter
    """

    def __init__(self, files: BlockFiles, preadv: VectoredCall, meter: ReadMeter) -> None:
        self._files = files
        self._preadv = preadv
        self._meter = meter

    def read(self, found: Found, channels: Ints) -> Runs:
        """Read runs of all blocks; see ``ChannelStore.read``."""
        num_blocks, heads, dim = found.scales.shape
        runs = (channels + dim * np.arange(heads)[:, None]).reshape(-1)
        scales = found.scales.reshape(num_blocks, heads * dim)[:, runs]
        addresses = found.starts[:, None] + found.run_bytes[:, None] * runs
        memory, bytes_read = torch.empty(0, dtype=torch.uint8), 0
        if found.is_file.any():
            in_files = np.flatnonzero(found.is_file)
            blocks = [found.blocks[index] for index in in_files]
            lengths = found.run_bytes[in_files]
            extents, offsets = plan_reads(addresses[in_files], lengths)
            bytes_read = int(extents.num_bytes.sum())
            memory = thread_memory("channel runs", bytes_read)
            for first in range(0, len(blocks), _MAX_OPEN):
                self._read(blocks, first, extents, memory)
            self._meter.add(bytes_read, len(extents.offsets))
            addresses[in_files] = memory.data_ptr() + offsets
            self._verify(blocks, addresses[in_files], lengths, runs)
        shape = (num_blocks, *channels.shape)
        return Runs(addresses.reshape(shape), scales.reshape(shape), bytes_read, found, memory)

    def _read(self, blocks: Sequence[Block], first: int, extents: Extents, memory: Tensor) -> None:
        """Read the extents of at most ``_MAX_OPEN`` blocks."""
        here = slice(*np.searchsorted(extents.block, [first, first + _MAX_OPEN]))
        block, offsets, num_bytes, places = (each[here] for each in extents)
        with ExitStack() as stack:
            fds = []
            for each in blocks[first : first + _MAX_OPEN]:
                fds.append(self._open(each))
                stack.callback(os.close, fds[-1])
            queue = thread_queue() if self._files.is_direct else None
            if queue is not None and self._preadv is os.preadv:
                own = np.array(fds)[block - first]
                if queue.read(own, offsets, memory.data_ptr() + places, num_bytes):
                    return
            into = memory.numpy().data
            rows = np.stack([block, offsets, num_bytes, places], axis=1).tolist()
            for index, offset, length, place in rows:
                file = str(self._files.path(blocks[index].number))
                piece = into[place : place + length]
                try:
                    read_fully(fds[index - first], [piece], offset, file, self._preadv)
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
        self, blocks: Sequence[Block], addresses: Ints, run_bytes: Ints, runs: Ints
    ) -> None:
        bad: list[tuple[Block, str]] = []
        for length in set(run_bytes.tolist()):
            alike = np.flatnonzero(run_bytes == length)
            own = checksums(addresses[alike].reshape(-1), length).reshape(len(alike), -1)
            for index, found in zip(alike.tolist(), own, strict=True):
                block = blocks[index]
                stored = block.checksums.reshape(-1)[runs]
                for run in np.flatnonzero(found != stored)[:1]:
                    head, channel = divmod(int(runs[run]), block.scales.shape[1])
                    what = f"head {head}, channel {channel}: {found[run]:016x}, the header says"
                    bad.append((block, f"{what} {stored[run]:016x}"))
        if bad:
            block, what = bad[0]
            raise BadBlocks(
                f"{self._files.path(block.number)}: {len(bad)} of {len(blocks)} blocks have a "
                f"wrong checksum, first block {block.number}, {what}",
                [block.number for block, _ in bad],
            )


def plan_reads(starts: Ints, run_bytes: Ints) -> tuple[Extents, Ints]:
    """Join runs into extents of whole pages. Pure.

    Parameters
    ----------
    starts : ndarray, int64 [num_files, num_runs]
        Where each run begins in its file.
    run_bytes : ndarray, int64 [num_files]

    Returns
    -------
    Extents
    ndarray, int64 [num_files, num_runs]
        Where in memory each run will begin.
    """
    first = starts // PAGE_BYTES
    end = -(-(starts + run_bytes[:, None]) // PAGE_BYTES)
    is_new = np.ones(starts.shape, np.bool_)
    # Runs that are not in order begin a new extent, too: slower, and as right.
    is_new[:, 1:] = (first[:, 1:] > end[:, :-1]) | (first[:, 1:] < first[:, :-1])
    leads = np.flatnonzero(is_new)
    tails = np.append(leads[1:], starts.size) - 1
    offsets = first.reshape(-1)[leads] * PAGE_BYTES
    num_bytes = end.reshape(-1)[tails] * PAGE_BYTES - offsets
    places = np.cumsum(num_bytes) - num_bytes
    extent = np.cumsum(is_new.reshape(-1)) - 1
    memory = starts + (places - offsets)[extent].reshape(starts.shape)
    return Extents(leads // starts.shape[1], offsets, num_bytes, places), memory
