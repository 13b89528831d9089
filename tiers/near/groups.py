"""Groups of tokens out of records: read, verified, and kept for the next step."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from offload.errors import CorruptChunk
from offload.kernels.xxh3 import checksums
from offload.tiers.near.extents import plan_reads
from offload.tiers.near.piece_cache import PieceCache
from offload.tiers.near.records import Ints, ShardRecords
from offload.tiers.near.scratch_memory import thread_memory
from offload.types import PAGE_BYTES, SlotId

_INDEX_BITS = 32
"""Of a name, for a unit in its segment."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadGroups:
    """Groups of tokens in memory, in use until ``close``.

    Attributes
    ----------
    addresses : ndarray, int64 [n]
        Valid until then, and until the thread that read them reads again.
    bytes_read, num_reads : int
        From files, and in how many requests.
    memory : Tensor, uint8
        Holds those that were read.
    cache : PieceCache
        Holds those that were read before, at ``places``.
    """

    addresses: Ints
    bytes_read: int
    num_reads: int
    memory: Tensor
    cache: PieceCache
    places: Ints

    def close(self) -> None:
        """Say, once, that nothing of it is needed any more."""
        self.cache.give_back(self.places)


class GroupReader:
    """Reads groups of tokens of single heads. Any thread may call any method.

    A slot never holds another chunk, so that what is kept cannot be stale.

    Parameters
    ----------
    records : ShardRecords
    cache : PieceCache
        Keeps groups that are no longer than its pieces.
    """

    def __init__(self, records: ShardRecords, cache: PieceCache) -> None:
        self._records = records
        self._fmt = records.fmt
        self._cache = cache
        self._sizes: set[int] = set()
        self._units_per_record = records.layout.num_kv_heads * records.fmt.units_per_head

    def read(self, slots: Ints, heads: Ints, first: Ints, num_tokens: int) -> ReadGroups:
        """Read groups, those that are not kept all at once, and verify them.

        Parameters
        ----------
        slots, heads, first : ndarray, int64 [n]
            Of each group: its record, its head and its first token in the chunk; each group once.
        num_tokens : int
            A multiple of ``ShardRecords.group_tokens``, as each of ``first``.

        Returns
        -------
        ReadGroups
            In memory that the next ``read`` of the same thread overwrites. Close it.

        Raises
        ------
        CorruptChunk, StorageError
        """
        fmt = self._fmt
        units = heads * fmt.units_per_head + first // fmt.unit_tokens
        each = num_tokens // fmt.unit_tokens
        num_bytes = each * fmt.unit_bytes
        names = self._names(slots, units, each)
        self._sizes.add(each)
        places = self._cache.take(names)
        is_there = places >= 0
        places, missed = places[is_there], np.flatnonzero(~is_there)
        addresses = np.empty(len(slots), np.int64)
        addresses[is_there] = self._cache.address(places)
        try:
            starts = (slots & 0xFFFFFFFF) * fmt.record_bytes + PAGE_BYTES + units * fmt.unit_bytes
            missed = missed[np.lexsort((starts[missed], slots[missed] >> 32))]
            lengths = np.full(len(missed), num_bytes)
            extents, offsets = plan_reads(slots[missed] >> 32, starts[missed], lengths)
            bytes_read = int(extents.num_bytes.sum())
            memory = thread_memory("groups", bytes_read)
            addresses[missed] = memory.data_ptr() + offsets
            if len(missed):
                self._records.read_pages(extents, memory)
                self._verify(slots[missed], units[missed], each, addresses[missed])
            if num_bytes <= self._cache.piece_bytes:
                self._cache.keep(names[missed], addresses[missed], lengths)
        except BaseException:
            self._cache.give_back(places)
            raise
        num_reads = len(extents.offsets)
        return ReadGroups(addresses, bytes_read, num_reads, memory, self._cache, places)

    def forget(self, slots: Iterable[SlotId]) -> None:
        """Drop what is kept of records."""
        dead = np.fromiter(slots, np.int64)[:, None]
        for each in tuple(self._sizes):
            names = self._names(dead, np.arange(self._units_per_record), each)
            self._cache.drop(names.reshape(-1).tolist())

    def _names(self, slots: Ints, units: Ints, each: int) -> Ints:
        """Return the names of groups of so many units, negative unlike those of channels."""
        inside = (slots & 0xFFFFFFFF) * self._units_per_record + units
        kind = self._fmt.units_per_head + 1
        return -2 - ((slots >> 32 << _INDEX_BITS) + inside) * kind - each

    def _verify(self, slots: Ints, units: Ints, each: int, addresses: Ints) -> None:
        fmt, steps = self._fmt, np.arange(each)
        names, which = np.unique(slots, return_inverse=True)
        expected = np.stack([self._records.checksums(SlotId(int(name))) for name in names])
        places = (addresses[:, None] + steps * fmt.unit_bytes).reshape(-1)
        found = checksums(places, fmt.unit_bytes).reshape(-1, each)
        wrong = found != expected[which[:, None], units[:, None] + steps]
        if wrong.any():
            bad = np.argwhere(wrong)[0]
            i, unit = int(bad[0]), int(units[bad[0]] + bad[1])
            info = self._records.info(SlotId(int(slots[i])))
            raise CorruptChunk(
                f"chunk {info.chunk_id} (layer {info.layer}, token {info.first_token}): the "
                f"checksum of {int(wrong.sum())} of {wrong.size} units is wrong, first unit {unit}:"
                f" {int(found[i, bad[1]]):016x}, the record says "
                f"{int(expected[which[i], unit]):016x}"
            )
