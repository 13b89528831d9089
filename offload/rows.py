"""Chunk lists of the rows of a batch; beams and forks share them until they diverge."""

from collections.abc import Callable, Iterable, Sequence

from offload.types import ChunkId


class RowTables:
    """For each row of the batch of one layer, its chunks in order.

    Rows that are copies of each other (beams, repeated prompts) share one list, so that reordering
    beams permutes references and touches no chunk; a list is copied when one of its rows grows.
    A chunk's reference count is the number of lists that hold it.

    Invariant: all lists are equally long. Not thread-safe.

    Parameters
    ----------
    share : callable
        Adds a reference to each chunk.
    release : callable
        Drops a reference from each chunk.
    """

    def __init__(
        self,
        share: Callable[[Iterable[ChunkId]], None],
        release: Callable[[Iterable[ChunkId]], None],
    ) -> None:
        self._share = share
        self._release = release
        self._rows: list[list[ChunkId]] = []
        self.version = 0
        """Grows whenever a row changes."""

    @property
    def rows(self) -> Sequence[Sequence[ChunkId]]:
        """The lists, one per row; do not change them."""
        return self._rows

    @property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return len(self._rows)

    @property
    def num_positions(self) -> int:
        """Chunks per row."""
        return len(self._rows[0]) if self._rows else 0

    def open(self, num_rows: int) -> None:
        """Start with so many empty rows."""
        assert not self._rows
        self._rows = [[] for _ in range(num_rows)]

    def extend(self, columns: Sequence[Sequence[ChunkId]]) -> None:
        """Append new chunks, given by position and then by row, each with one reference."""
        for i, row in enumerate(self._rows):
            if any(row is other for other in self._rows[:i]):
                self._share(row)
                self._rows[i] = list(row)
        for column in columns:
            for row, chunk in zip(self._rows, column, strict=True):
                row.append(chunk)
        self.version += 1

    def truncate(self, num_positions: int) -> None:
        """Drop the chunks from ``num_positions`` on."""
        dropped: list[ChunkId] = []
        for row in self._distinct():
            dropped += row[num_positions:]
            del row[num_positions:]
        self.version += 1
        self._release(dropped)

    def select(self, indices: Sequence[int]) -> None:
        """Make row ``i`` a copy of what was row ``indices[i]``."""
        before = self._distinct()
        self._rows = [self._rows[index] for index in indices]
        kept = {id(row) for row in self._rows}
        self.version += 1
        for row in before:
            if id(row) not in kept:
                self._release(row)

    def fork(self) -> "RowTables":
        """Return a copy with lists of its own, sharing every chunk."""
        copy = RowTables(self._share, self._release)
        copies = {}
        for row in self._distinct():
            self._share(row)
            copies[id(row)] = list(row)
        copy._rows = [copies[id(row)] for row in self._rows]
        return copy

    def close(self) -> None:
        """Release everything."""
        rows, self._rows = self._distinct(), []
        self.version += 1
        for row in rows:
            self._release(row)

    def _distinct(self) -> list[list[ChunkId]]:
        return list({id(row): row for row in self._rows}.values())
