"""Attention over the records of one worker: all of them, or those that SparF names."""

from collections.abc import Collection, Iterator
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.errors import CorruptChunk
from offload.kernels import dispatch, sparf
from offload.kernels.reference import merge
from offload.tiers.near.channel_store import ChannelStore
from offload.tiers.near.channel_table import Found
from offload.tiers.near.groups import GroupReader
from offload.tiers.near.piece_cache import PieceCache
from offload.tiers.near.records import Ints, ShardRecords
from offload.tiers.near.scratch_memory import thread_memory
from offload.tiers.near.sparf_settings import SparF
from offload.tiers.pool import as_chunk
from offload.tiers.read_meter import ReadMeter
from offload.types import Partial, SlotId

_READ_BYTES = 4 << 20
"""Of records that are read together; while they are attended the next ones are under way."""


@dataclass(slots=True, eq=False)
class RowChunks:
    """What is attended for one row of a batch.

    Attributes
    ----------
    slots : ndarray, int64 [num_chunks]
    found : Found or None
        Where their channels were when they were last looked for.
    """

    slots: Ints
    found: Found | None = None


class ShardAttention:
    """Attends over records where they are. Any thread may call any method.

    Parameters
    ----------
    records : ShardRecords
    channels : ChannelStore or None
        Needed by SparF only.
    cache : PieceCache
        Of groups of tokens.
    ahead : Executor
        Reads records that will be attended next; its threads call nothing of this.
    """

    def __init__(
        self,
        records: ShardRecords,
        channels: ChannelStore | None,
        cache: PieceCache,
        ahead: Executor,
    ) -> None:
        self._records = records
        self._groups = GroupReader(records, cache)
        self._channels = channels
        self._ahead = ahead
        self._layout = records.layout
        self.meter = ReadMeter()
        """What was read to attend, and not to be fetched."""

    def dense(self, query: Tensor, slots: Ints) -> Partial:
        """Attend to every token of some chunks.

        Parameters
        ----------
        query : Tensor, shape (num_kv_heads, group_size, key_dim), float32
            Scaled.
        slots : ndarray, int64 [num_chunks]

        Returns
        -------
        Partial
            ``out`` [num_kv_heads, group_size, value_dim], ``lse`` of it.

        Raises
        ------
        CorruptChunk, StorageError
        """
        layout = self._layout
        parts = [empty_partial(query, layout.value_dim)]
        self.meter.add(len(slots) * self._records.fmt.record_bytes, len(slots))
        for buffers in self._stream(slots):
            head_bytes = self._records.fmt.head_bytes
            first = np.array([buffer.data_ptr() for buffer in buffers])
            places = first + np.arange(layout.num_kv_heads)[:, None] * head_bytes
            addresses = torch.from_numpy(places)
            parts.append(self._attend(query, addresses, layout.chunk_tokens))
        return merge(parts)

    def sparse(self, query: Tensor, row: RowChunks, how: SparF) -> Partial:
        """Attend to the groups of tokens that a few channels of the query point at.

        SparF attention (InstInfer, arXiv 2409.04992, section 4), with the temperature of SparQ. We
        choose whole groups, by their mass, because a group is what is read; and the log-sum-exp is
        that of the chosen tokens divided by their share, so that parts merge like exact ones. The
        mean of the values stands for everything else.

        Parameters and errors as for ``dense``.
        """
        assert self._channels is not None
        slots = row.slots
        size = self._layout.chunk_tokens
        group = _group_tokens(how.group_tokens, self._records.group_tokens, size)
        num_groups = how.num_groups(len(slots) * size, group)
        if num_groups * group >= len(slots) * size:
            return self.dense(query, slots)
        logits = self._approximate(query, row, how.channels)
        if logits is None or row.found is None:
            return self.dense(query, slots)
        chosen, alpha = sparf.choose_groups(logits, group, num_groups)
        heads = np.repeat(np.arange(len(chosen)), chosen.shape[1])
        chunk, inside = np.divmod(chosen.reshape(-1), size // group)
        with closing(self._groups.read(slots[chunk], heads, inside * group, group)) as groups:
            self.meter.add(groups.bytes_read, groups.num_reads)
            addresses = torch.from_numpy(groups.addresses.reshape(chosen.shape))
            read = self._attend(query, addresses, group)
        mean = self._channels.means(row.found)
        out, lse = sparf.finish(read.out.numpy(), read.lse.numpy(), alpha, mean)
        return Partial(torch.from_numpy(out), torch.from_numpy(lse))

    def _approximate(
        self, query: Tensor, row: RowChunks, num_channels: int
    ) -> NDArray[np.float32] | None:
        """Return logits of all tokens by a few channels; heals the channel copy on the way.

        None if that cannot be healed: it finds no room, or what is written comes back damaged.
        """
        assert self._channels is not None
        asked = query.numpy()
        channels, coverage = sparf.choose_channels(asked, min(num_channels, asked.shape[2]))
        for _ in range(2):
            found = self._channels.find(row.slots, row.found)
            if len(found.missing):
                self._rebuild(row.slots[found.missing])
                found = self._channels.find(row.slots)
            row.found = found
            if len(found.missing):
                return None
            try:
                runs = self._channels.read(found, channels)
            except CorruptChunk:
                continue  # the damaged block is gone; its chunks are copied once more
            with closing(runs):
                self.meter.add(runs.bytes_read, runs.num_reads)
                return sparf.approximate(
                    asked,
                    channels,
                    coverage,
                    runs.addresses,
                    runs.scales,
                    found.block,
                    found.column,
                    self._layout.chunk_tokens,
                )
        return None

    def forget(self, slots: Collection[SlotId]) -> None:
        """Drop what is kept of chunks that are dead."""
        self._groups.forget(slots)

    def _rebuild(self, slots: Ints) -> None:
        """Copy the keys of records into the channel store."""
        assert self._channels is not None
        done = 0
        for buffers in self._stream(slots):
            part = [SlotId(int(slot)) for slot in slots[done : done + len(buffers)]]
            lanes = [(self._records.info(slot).layer, -1) for slot in part]
            self.add_channels(part, lanes, buffers)
            done += len(buffers)

    def add_channels(
        self, slots: list[SlotId], lanes: list[tuple[int, int]], buffers: list[Tensor]
    ) -> None:
        """Copy the keys of chunks in memory into the channel store."""
        assert self._channels is not None
        chunks = torch.stack([as_chunk(buffer, self._layout) for buffer in buffers])
        keys, values = chunks.split([self._layout.key_dim, self._layout.value_dim], -1)
        sums = values.float().sum(2).numpy()
        self._channels.add(slots, lanes, keys, sums)

    def _attend(self, query: Tensor, addresses: Tensor, rows_per_address: int) -> Partial:
        layout = self._layout
        return dispatch.attend_rows(
            query, addresses, layout.value_dim, layout.dtype, rows_per_address
        )

    def _stream(self, slots: Ints) -> Iterator[list[Tensor]]:
        """Yield buffers with the records of consecutive slots, valid until the next ones."""
        size = self._layout.slot_bytes
        step = max(1, min(len(slots), _READ_BYTES // size))
        parts = [slots[start : start + step] for start in range(0, len(slots), step)]
        num_bytes = min(2, len(parts)) * step * size
        memory = thread_memory("stream", num_bytes)[:num_bytes]
        rings = list(memory.view(-1, step, size))
        reads: list[Future[None]] = []

        def start(number: int) -> None:
            names = [SlotId(int(slot)) for slot in parts[number]]
            out = list(rings[number % 2][: len(names)])
            reads.append(self._ahead.submit(self._records.read, names, None, out))

        if parts:
            start(0)
        for number, part in enumerate(parts):
            try:
                reads[number].result()
                if number + 1 < len(parts):
                    start(number + 1)
                yield list(rings[number % 2][: len(part)])
            except BaseException:
                for read in reads:  # they write into the memory that is about to go
                    read.exception()
                raise


def empty_partial(query: Tensor, value_dim: int) -> Partial:
    """Return attention over nothing, for ``query`` [num_kv_heads, group_size, key_dim]."""
    out = query.new_zeros(*query.shape[:2], value_dim)
    return Partial(out, query.new_full(query.shape[:2], -torch.inf))


def _group_tokens(wanted: int, least: int, chunk_tokens: int) -> int:
    """Return the shortest verified run of tokens that chunks divide into, no less than wanted."""
    for tokens in range(least, chunk_tokens, least):
        if tokens >= wanted and chunk_tokens % tokens == 0:
            return tokens
    return chunk_tokens
