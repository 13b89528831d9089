"""Find the rows of tokens wherever they lie, and read from the disk what is in no memory."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from offload.prefetch.line_cache import LineCache, lines_that_fit
from offload.sparse.row_demand import Demands, Sought, addresses_among
from offload.sparse.row_keys import Ints, RowKeys
from offload.sparse.row_places import ChunkPlaces, RowChunks, RowKey
from offload.sparse.row_plan import RowMemory, RowPlan
from offload.sparse.row_reads import PieceReads
from offload.store import ChunkStore
from offload.tiers.base import ReadsParts
from offload.tiers.pinned import PinnedRegion
from offload.tiers.pool import page_aligned
from offload.types import ChunkId

_NONE = np.zeros(0, dtype=np.int64)

_HEADS = RowPlan(piece_tokens=None)


class RowReader:
    """Says at which addresses the rows of tokens can be read, for all layers of one store.

    A row of a chunk in memory is read in place, from the tier's pool or the write buffer. Of chunks
    that lie on the disk only, single rows are kept in a cache of lines; what is not there is read,
    a piece of a head at a time, the best first, and not longer waited for than the caller wants.
    What arrives later is in the cache for the next call.

    Only the thread that holds the engine's lock calls methods. Reads run on the threads of the disk
    tier; what they brought is taken at the beginning of ``locate``, so tables have one writer and
    addresses hold until then.

    Parameters
    ----------
    store : ChunkStore
    device : torch.device
        Where addresses will be read: on a CPU, or on a CUDA device by its unified addresses.
    memory : RowMemory
        Of the host, counted by the caller.
    plan : RowPlan
        All but how long to wait.
    limit : callable, optional
        Called when a layer begins. With ``least_disk_share`` it is told how many pieces on the disk
        are wanted, and returns how many may be read, the best first, or None: all. Without, it is
        told 0.
    """

    def __init__(
        self,
        store: ChunkStore,
        device: torch.device,
        memory: RowMemory,
        plan: RowPlan = _HEADS,
        limit: Callable[[int], int | None] = lambda wanted: None,
    ) -> None:
        self._store = store
        self._limit = limit
        self._is_limited = plan.least_disk_share is not None
        self.reads_ahead = plan.reads_ahead
        """Whether ``prefetch`` does anything."""
        self._names = RowKeys.of(store.layout, _whole_parts(store, plan.piece_tokens))
        self._places = ChunkPlaces(store, device)
        self._memory = page_aligned(memory.num_bytes)
        self._pinned = PinnedRegion(self._memory) if device.type == "cuda" else None
        if self._pinned is not None and memory.num_bytes:
            self._pinned.lock(0, memory.num_bytes)
        staging = self._memory[: memory.staging_bytes]
        self._reads = PieceReads(
            store,
            staging,
            self._names,
            is_pinned=self._pinned is not None,
            most_in_flight=plan.most_in_flight,
        )
        self._lines = self._make_lines(self._memory[memory.staging_bytes :])
        self._demands = Demands(self._reads, self._names, store.counters)
        self._dead: list[ChunkId] = []

    @property
    def num_lines(self) -> int:
        """Rows that the cache of lines has room for."""
        return self._lines.num_lines

    @property
    def num_used_lines(self) -> int:
        """Rows that are in it."""
        return self._lines.num_used

    @property
    def num_flying(self) -> int:
        """Pieces that are being read, or were and are not taken yet."""
        return self._reads.num_flying

    def locate(
        self,
        layer: int,
        row_key: RowKey,
        version: Hashable,
        chunks: Sequence[ChunkId],
        heads: Sequence[int],
        ids: Ints,
        *,
        deadline_s: float | None = None,
    ) -> Ints:
        """Return the addresses of rows, reading what is in no memory.

        Addresses are valid until the next call, or ``release``, or until the store is told to move
        chunks. ``prefetch`` leaves them valid.

        Parameters
        ----------
        layer : int
        row_key : (owner, row)
            Whose row it is; see ``forget``.
        version : Hashable
            Changes with the row's list of chunks.
        chunks : sequence of ChunkId
            A run of that list; token ``t`` is in ``chunks[t // chunk_tokens]``.
        heads : sequence of int
            KV heads.
        ids : ndarray, int64 [len(heads), num_tokens]
            Tokens per head, the best first; -1 is none.
        deadline_s : float, optional
            Longest wait; 0: take what is there. By default everything is waited for, each read as
            long as the store's deadline.

        Returns
        -------
        ndarray, int64 [len(heads), num_tokens]
            Address of each row's first byte: keys, then values. 0 where the id is -1, or the row is
            not to be had in time.

        Raises
        ------
        CorruptChunk, StorageError
            A row that is needed cannot be read. Everything can be asked for again.
        TransferTimeout
            Without ``deadline_s``: a read has missed the store's.
        """
        sought = self.begin(layer, row_key, version, chunks, heads, ids)
        return self.finish(sought, deadline_s=deadline_s)

    def begin(
        self,
        layer: int,
        row_key: RowKey,
        version: Hashable,
        chunks: Sequence[ChunkId],
        heads: Sequence[int],
        ids: Ints,
    ) -> Sought:
        """Begin what ``locate`` does. Several may be begun before the first one is finished.

        Their addresses hold until all of them are finished and the next one begins, or ``release``.
        """
        if self._demands.is_idle:
            self._take_landed()
        row = self._places.row(layer, row_key, version, chunks)
        addresses = self._in_place(row, heads, ids)
        counters = self._store.counters
        for tier, count in self._places.count_by_tier(addresses).items():
            counters.add_loaded(tier, count * self._names.row_bytes)
        missing, keys = self._missing(row, heads, ids, addresses)
        found = self._lines.find(keys) if len(keys) else keys
        absent = np.nonzero(found == 0)[0]
        counters.line_lookups += len(keys)
        counters.line_hits += len(keys) - len(absent)
        addresses[missing] = found
        lines, ranks = missing
        sought = Sought(addresses, (lines[absent], ranks[absent]), keys[absent])
        allowed = keys[self._allowed(keys, absent)]
        if len(allowed):
            lifted, rows = self._places.lift(allowed, self._names)
            self._demands.fresh += rows
            sought.demand = self._demands.begin(allowed[~lifted])
            sought.demand.found += rows
        return sought

    def finish(self, sought: Sought, *, deadline_s: float | None = None) -> Ints:
        """Wait for what was begun, and return the addresses; see ``locate``."""
        if sought.demand is not None:
            self._demands.finish(sought.demand, deadline_s, self._store.deadline_s)
            sought.addresses[sought.absent] = addresses_among(sought.demand.found, sought.keys)
        self._store.counters.late_rows += sought.num_late
        return sought.addresses

    def prefetch(
        self,
        layer: int,
        row_key: RowKey,
        version: Hashable,
        chunks: Sequence[ChunkId],
        heads: Sequence[int],
        ids: Ints,
    ) -> int:
        """Begin to read rows that will probably be asked for, as far as there is room.

        For any layer: this step's next one, or tokens just below the cut and late ones for the next
        step. Does not wait, and yields to what is needed now. A read that fails is counted.

        Parameters
        ----------
        layer, row_key, version, chunks, heads, ids
            As for ``locate``.

        Returns
        -------
        int
            Pieces whose read has begun.
        """
        if not self.reads_ahead:
            return 0
        self._dead += self._places.refresh()
        row = self._places.row(layer, row_key, version, chunks)
        _, keys = self._missing(row, heads, ids, self._in_place(row, heads, ids))
        if not len(keys):
            return 0
        keys = keys[self._lines.find(keys) == 0]
        wanted = self._names.wanted(keys)
        of_pieces = map(self._names.chunk_of, wanted.pieces.tolist())
        is_on_disk = [not self._places.is_foreign(chunk) for chunk in of_pieces]
        wanted = wanted.some(np.flatnonzero(is_on_disk))
        wanted = wanted.some(self._reads.join(wanted)[: self._reads.room(is_urgent=False)])
        self._reads.start(wanted, is_urgent=False)
        return len(wanted)

    def release(self) -> None:
        """Declare that nobody reads the addresses of the last call any more."""
        for keys, rows in self._demands.fresh:
            self._lines.insert(keys, rows)
        self._demands.clear()

    def forget(self, owner: int) -> None:
        """Drop what is kept for the rows of a cache or fork; lines are everybody's."""
        self._places.forget(owner)

    def settle(self) -> None:
        """Wait for the reads under way, and let go of their chunks.

        Raises
        ------
        TransferTimeout
            One has missed the store's deadline.
        """
        self._reads.settle(self._store.deadline_s)
        self._take_landed()

    def close(self) -> None:
        """Wait for the reads under way and give the memory back. Idempotent.

        Raises
        ------
        TransferTimeout
            One has missed the store's deadline; it keeps its buffer.
        """
        try:
            self.settle()
        finally:
            self._demands.clear()
            if self._pinned is not None:
                self._pinned.close()
            self._lines = self._make_lines(page_aligned(0))

    def _take_landed(self) -> None:
        """Put into lines what has arrived; addresses handed out before are invalid from here on."""
        self.release()
        for landing in self._reads.landed():
            if landing.rows is None:
                self._store.counters.failed_row_reads += 1
            else:
                self._lines.insert(landing.keys, landing.rows)
        self._dead += self._places.refresh()
        if self._dead:  # after what has just been put in, which may be theirs
            per_chunk = self._names.per_chunk
            self._lines.drop(np.array(self._dead, dtype=np.int64) * per_chunk, per_chunk)
            self._dead.clear()
        self._lines.tick()

    def _in_place(self, row: RowChunks, heads: Sequence[int], ids: Ints) -> Ints:
        """Return the addresses of rows of chunks in memory, 0 for the others."""
        size, row_bytes = self._names.chunk_tokens, self._names.row_bytes
        positions = ids // size
        bases = np.take(self._places.addresses(row), positions)
        first = np.asarray(heads, dtype=np.int64)[:, None] * size
        within = (ids - positions * size + first) * row_bytes
        return np.where(bases, bases + within, 0)

    def _missing(
        self, row: RowChunks, heads: Sequence[int], ids: Ints, addresses: Ints
    ) -> tuple[tuple[Ints, Ints], Ints]:
        """Return where tokens have no address, best first, and the keys of their rows."""
        absent = (addresses == 0) & (ids >= 0)
        if not absent.any():
            return (_NONE, _NONE), _NONE
        ranks, lines = np.nonzero(absent.T)
        tokens = ids[lines, ranks]
        positions = tokens // self._names.chunk_tokens
        offsets = tokens - positions * self._names.chunk_tokens
        keys = self._names.keys(row.ids[positions], np.asarray(heads)[lines], offsets)
        return (lines, ranks), keys

    def _allowed(self, keys: Ints, absent: Ints) -> Ints:
        """Return those absent rows, the best first, whose pieces there is time to read.

        Those in memory that cannot be read by address take none.
        """
        if not self._is_limited or not len(absent):
            self._limit(0)
            return absent
        pieces = self._names.pieces(keys[absent])
        names, first, which = np.unique(pieces, return_index=True, return_inverse=True)
        chunks = map(self._names.chunk_of, names.tolist())
        is_free = np.array([self._places.is_foreign(chunk) for chunk in chunks])
        num_read = len(names) - int(np.count_nonzero(is_free))
        most = self._limit(num_read)
        if most is None or most >= num_read:
            return absent
        first[is_free] = -1  # before all that are read
        rank = np.argsort(np.argsort(first, kind="stable"), kind="stable")
        return absent[rank[which] < most + len(names) - num_read]

    def _make_lines(self, memory: Tensor) -> LineCache:
        num_lines = lines_that_fit(memory.numel(), self._names.row_bytes)
        rows = memory[: num_lines * self._names.row_bytes].numpy()
        return LineCache(rows.reshape(num_lines, self._names.row_bytes))


def _whole_parts(store: ChunkStore, piece_tokens: int | None) -> int:
    """Return the fewest tokens, at least so many, that are whole parts and divide a chunk."""
    tokens, tier = store.layout.chunk_tokens, store.tiers[-1]
    if piece_tokens is None or not isinstance(tier, ReadsParts):
        return tokens
    part = tokens // tier.parts_per_head
    fitting = (n for n in range(part, tokens, part) if n >= piece_tokens and tokens % n == 0)
    return next(fitting, tokens)
