"""Pieces of chunks on their way from the disk, and the rows that are wanted of them."""

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload.errors import OffloadError, TransferTimeout
from offload.sparse.row_keys import Ints, RowKeys, Rows
from offload.sparse.row_wanted import Wanted
from offload.store import ChunkStore
from offload.tiers.base import ReadsParts
from offload.tiers.buffers import Buffers
from offload.tiers.transfer import Transfer
from offload.types import ChunkId, round_up

_FLIGHT_PIECES = 256
"""Of one transfer: few, so that the first ones can be used while the last ones are read; but
four for each of eight threads, which fewer would not keep busy."""


@dataclass(frozen=True, slots=True)
class Landing:
    """A read that has ended.

    Attributes
    ----------
    pieces : list of int
        What was read.
    keys : ndarray, int64 [n]
        Rows that were wanted of it.
    rows : ndarray, uint8 [n, row_bytes], or None
        A copy of these rows.
    error : OffloadError or None
        Why there is none.
    """

    pieces: list[int]
    keys: Ints
    rows: Rows | None
    error: OffloadError | None = None


@dataclass(slots=True, eq=False)
class _Flight:
    """A transfer: pieces, ascending, each into the staging buffer of its place."""

    pieces: Ints
    buffers: Ints
    chunks: list[ChunkId]
    wanted: list[Ints]
    transfer: Transfer
    is_urgent: bool


class PieceReads:
    """Reads under way, into a fixed number of staging buffers.

    The chunks of a read are protected until it is taken with ``landed``. Only the thread that holds
    the engine's lock calls methods; the disk tier's threads do the reading.

    Parameters
    ----------
    store : ChunkStore
    staging : Tensor, uint8 [num_bytes]
        Page-aligned host memory. A buffer is one piece, in whole pages.
    keys : RowKeys
    most_in_flight : int, optional
        Use no more of the buffers.
    is_pinned : bool
        Page-lock the copies of rows that are handed out.
    """

    def __init__(
        self,
        store: ChunkStore,
        staging: Tensor,
        keys: RowKeys,
        *,
        is_pinned: bool = False,
        most_in_flight: int | None = None,
    ) -> None:
        self._store = store
        self._keys = keys
        tier = store.tiers[-1]
        self._tier = tier if isinstance(tier, ReadsParts) else None
        self._is_pinned = is_pinned
        stride = round_up(keys.piece_bytes)
        self.num_buffers = min(staging.numel() // stride, most_in_flight or sys.maxsize)
        addresses = staging.data_ptr() + stride * np.arange(self.num_buffers)
        self._buffers = Buffers(addresses, keys.piece_bytes, staging)
        self._staged = np.lib.stride_tricks.as_strided(
            staging.numpy(),
            (self.num_buffers, keys.piece_tokens, keys.row_bytes),
            (stride, keys.row_bytes, 1),
        )
        self._free = list(range(self.num_buffers))
        self._flights: list[_Flight] = []
        self._flight_of: dict[int, _Flight] = {}

    @property
    def num_flying(self) -> int:
        """Pieces that are being read, or were and are not taken yet."""
        return len(self._flight_of)

    def room(self, *, is_urgent: bool) -> int:
        """Return how many pieces can be read now; what is not urgent gets half of the buffers."""
        if is_urgent:
            return len(self._free)
        patient = sum(len(flight.pieces) for flight in self._flights if not flight.is_urgent)
        return min(len(self._free), max(0, self.num_buffers // 2 - patient))

    def join(self, wanted: Wanted) -> Ints:
        """Want rows of pieces that are being read; return the places of those that are not."""
        places = np.arange(len(wanted))
        if not self._flight_of:
            return places
        flights = [self._flight_of.get(piece) for piece in wanted.pieces.tolist()]
        for place, flight in enumerate(flights):
            if flight is not None:
                flight.wanted.append(wanted.part(place))
        return places[[flight is None for flight in flights]]

    def start(self, wanted: Wanted, *, is_urgent: bool) -> None:
        """Begin to read pieces that are not being read yet.

        Parameters
        ----------
        wanted : Wanted
            No more than there is room for; those first that are needed first.
        is_urgent : bool
            Read before everything that is not.

        Raises
        ------
        OffloadError
            A read could not begin; those before it go on.
        """
        for first in range(0, len(wanted), _FLIGHT_PIECES):
            self._start_flight(wanted.run(first, first + _FLIGHT_PIECES), is_urgent)

    def landed(self) -> Iterator[Landing]:
        """Take the reads that have ended, one after the other; their buffers are free again."""
        for flight in [flight for flight in self._flights if flight.transfer.done()]:
            yield self._land(flight)

    def wait(self, pieces: Collection[int], timeout_s: float) -> None:
        """Wait for the first read of any of these pieces; if there is none, for the first read.

        Raises
        ------
        TransferTimeout
            It has not ended.
        """
        chosen = (each for each in self._flights if any(p in pieces for p in each.pieces.tolist()))
        _wait(next(chosen, self._flights[0]).transfer, timeout_s)

    def settle(self, timeout_s: float) -> None:
        """Wait until every read has ended, for each so long at most; none is taken.

        Raises
        ------
        TransferTimeout
        """
        for flight in self._flights:
            _wait(flight.transfer, timeout_s)

    def _start_flight(self, wanted: Wanted, is_urgent: bool) -> None:
        tier, disk = self._tier, len(self._store.tiers) - 1
        assert tier is not None, "there is no disk to read from"
        numbers = np.sort(wanted.pieces)
        buffers = np.array(self._free[-len(numbers) :])
        assert len(buffers) == len(numbers), "more pieces than buffers"
        num_parts = self._keys.piece_bytes // tier.part_bytes
        chunks, which, firsts = self._keys.chunks_and_places(numbers)
        entries = [self._store.table[chunk] for chunk in chunks]
        slots = np.array([entry.slots[disk] for entry in entries])
        transfer = tier.read_parts(
            slots[which].tolist(),
            [entries[number].info for number in which.tolist()],
            (firsts * num_parts).tolist(),
            self._buffers.some(buffers),
            num_parts=num_parts,
            urgent=is_urgent,
        )
        del self._free[-len(numbers) :]
        self._store.table.protect(chunks)
        flight = _Flight(numbers, buffers, chunks, [wanted.keys], transfer, is_urgent)
        self._flights.append(flight)
        self._flight_of |= dict.fromkeys(numbers.tolist(), flight)

    def _land(self, flight: _Flight) -> Landing:
        pieces, keys = flight.pieces.tolist(), np.concatenate(flight.wanted)
        self._flights.remove(flight)
        for piece in pieces:
            del self._flight_of[piece]
        try:
            flight.transfer.wait(0)
            landing = Landing(pieces, keys, self._copy(flight, keys))
        except OffloadError as error:
            landing = Landing(pieces, keys, None, error)
        finally:
            self._free += flight.buffers.tolist()
            self._store.unprotect(flight.chunks)
        if landing.rows is not None:
            self._store.counters.add_loaded("disk", flight.transfer.num_bytes)
        return landing

    def _copy(self, flight: _Flight, keys: Ints) -> Rows:
        """Copy rows out of staging, ``uint8 [len(keys), row_bytes]``."""
        buffers = flight.buffers[np.searchsorted(flight.pieces, self._keys.pieces(keys))]
        staged: Rows = self._staged[buffers, keys % self._keys.piece_tokens]
        if not self._is_pinned:
            return staged
        rows: Rows = torch.empty(staged.shape, dtype=torch.uint8, pin_memory=True).numpy()
        rows[:] = staged
        return rows


def _wait(transfer: Transfer, timeout_s: float) -> None:
    """Wait for a transfer to end, well or badly; how it went is asked when it is taken."""
    try:
        transfer.wait(timeout_s)
    except TransferTimeout:
        raise
    except OffloadError:
        assert transfer.done()
