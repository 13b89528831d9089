"""What is kept of a layer from one step to the next."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from offload.index.base import Hits, KeyIndex
from offload.sparse.row_keys import Ints
from offload.types import ChunkId


@dataclass(slots=True)
class Outlook:
    """What a layer was last asked about, and what it is expected to choose next.

    Attributes
    ----------
    version : int
        Of its rows, then.
    ripe, covered : range
        Chunks; see ``SparsePlan``.
    expected : dict of int to ndarray
        By row of the batch, int64 [len(heads), num_tokens].
    past : dict of int to Hits
        By row of the batch, what its first position found last, for indexes that go on from there.
    store_version, is_beyond_memory
        Whether, at that version of the store, some of what is covered was on the disk only.
    """

    version: int = -1
    ripe: range = range(0)
    covered: range = range(0)
    expected: dict[int, Ints] = field(default_factory=dict)
    past: dict[int, Hits] = field(default_factory=dict)
    store_version: int = -1
    is_beyond_memory: bool = False

    def follow(self, version: int, ripe: range, covered: range) -> None:
        """Note what is asked about now."""
        if (version, ripe, covered) != (self.version, self.ripe, self.covered):
            if covered.start != self.covered.start or covered.stop < self.covered.stop:
                self.past.clear()  # an index follows growth at its end only
            self.version, self.ripe, self.covered = version, ripe, covered
            self.store_version = -1

    def remember(self, row: int, position: int, index: KeyIndex, hits: Hits) -> None:
        """Keep what a search found, if the next one can use it."""
        if index.follows_searches and position == 0:
            self.past[row] = hits


class Run(NamedTuple):
    """Chunks of one row of a layer, and the heads that are read of them; see ``RowReader``."""

    layer: int
    row_key: tuple[int, int]
    version: Hashable
    chunks: Sequence[ChunkId]
    heads: tuple[int, ...]
