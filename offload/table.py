"""Where every chunk is, and who needs it. Pure bookkeeping: no bytes move here."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from offload.types import ChunkId, ChunkInfo, SlotId


@dataclass(slots=True)
class Entry:
    """One chunk: its identity, its owners, and its copies.

    Attributes
    ----------
    info : ChunkInfo
    ref_count : int
        Row tables that list the chunk.
    protect_count : int
        Transfers that read it now; its copies may not be dropped meanwhile.
    slots : dict
        Tier level to slot, for every tier that holds the chunk, readable.
    pending : Tensor or None
        Write buffer that holds the chunk while its way to the disk is not finished.
    """

    info: ChunkInfo
    ref_count: int = 1
    protect_count: int = 0
    slots: dict[int, SlotId] = field(default_factory=dict)
    pending: Tensor | None = None


class ChunkTable:
    """All chunks of a store.

    Invariant: an entry with ``ref_count > 0`` has at least one copy, in a tier or pending. Not
    thread-safe: only the thread that runs the model touches it.
    """

    def __init__(self) -> None:
        self._entries: dict[ChunkId, Entry] = {}
        self._next = 0
        self.protected: set[ChunkId] = set()
        """Chunks with ``protect_count > 0``."""

    def __getitem__(self, chunk: ChunkId) -> Entry:
        return self._entries[chunk]

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[ChunkId]:
        return iter(self._entries)

    def create(self, layer: int, first_token: int, record_id: int | None = None) -> ChunkId:
        """Register a new chunk with one reference and no copy yet.

        ``record_id`` is the identity in a record that exists already; else the chunk's own.
        """
        chunk = ChunkId(self._next)
        self._next += 1
        identity = chunk if record_id is None else record_id
        self._entries[chunk] = Entry(ChunkInfo(identity, layer, first_token))
        return chunk

    def share(self, chunks: Iterable[ChunkId]) -> None:
        """Add one reference to each chunk."""
        for chunk in chunks:
            self._entries[chunk].ref_count += 1

    def release(self, chunks: Iterable[ChunkId]) -> list[ChunkId]:
        """Drop one reference from each; return those that nobody needs any more."""
        dead = []
        for chunk in chunks:
            entry = self._entries[chunk]
            entry.ref_count -= 1
            if entry.ref_count == 0 and entry.protect_count == 0:
                dead.append(chunk)
        return dead

    def protect(self, chunks: Iterable[ChunkId]) -> None:
        """Keep the copies of these chunks in place until ``unprotect``."""
        for chunk in chunks:
            self._entries[chunk].protect_count += 1
            self.protected.add(chunk)

    def unprotect(self, chunks: Iterable[ChunkId]) -> list[ChunkId]:
        """Undo one ``protect``; return those that died in the meantime."""
        dead = []
        for chunk in chunks:
            entry = self._entries[chunk]
            entry.protect_count -= 1
            if entry.protect_count == 0:
                self.protected.discard(chunk)
                if entry.ref_count == 0:
                    dead.append(chunk)
        return dead

    def forget(self, chunk: ChunkId) -> Entry:
        """Remove a dead chunk and return what is left of it, for its copies to be freed."""
        return self._entries.pop(chunk)

    def check_integrity(self) -> None:
        """Raise AssertionError if a chunk is nowhere, or two are in one slot."""
        held = [place for entry in self._entries.values() for place in entry.slots.items()]
        assert len(set(held)) == len(held), "two chunks are in one slot"
        for chunk, entry in self._entries.items():
            assert entry.slots or entry.pending is not None, f"chunk {chunk} is in no tier"
