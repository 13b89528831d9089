"""Where the codes of each chunk lie: blocks in files, and tails in memory. Bookkeeping, no I/O."""

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, repeat

import numpy as np
from numpy.typing import NDArray

from offload.tiers.near.channel_block import Block, Floats, Ints, Lane
from offload.types import ChunkLayout

COLUMN_BITS = 20
"""A place is a block's number, shifted by so many bits, plus the chunk's column in it."""

_NOWHERE = -1


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Where the codes of some chunks were, when they were looked for.

    It stays readable whatever is written meanwhile, and keeps codes in memory as long as it lives.

    Attributes
    ----------
    slots : ndarray, int64 [n]
    block, column : ndarray, int64 [n]
        Which of ``blocks``, and which run of ``chunk_tokens`` tokens in it; -1 and 0 if missing.
    missing : ndarray, int64
        Positions of the slots that are held nowhere.
    blocks : tuple of Block
        B of them, each once.
    starts, run_bytes : ndarray, int64 [B]
        Address of the first code, or its offset in the file; and bytes of a run.
    is_file : ndarray, bool [B]
    scales : ndarray, float32 [B, num_kv_heads, key_dim]
    value_means : ndarray, float32 [B, num_kv_heads, value_dim]
    places : ndarray, int64 [n]
    version : int
        Of the table. While it has not changed, nothing that was found has moved.
    """

    slots: Ints
    block: Ints
    column: Ints
    missing: Ints
    blocks: tuple[Block, ...]
    starts: Ints
    run_bytes: Ints
    is_file: NDArray[np.bool_]
    scales: Floats
    value_means: Floats
    places: Ints
    version: int


class ChannelTable:
    """Blocks, the chunks that are alive in them, and the tail of each lane.

    A tail is the blocks in memory of one lane, of one chunk each, oldest first. Invariant: every
    block has a chunk alive, which is in no other. Hold ``lock`` while you use it.

    Parameters
    ----------
    layout : ChunkLayout

    Attributes
    ----------
    lock : Lock
    version : int
        Changes when a chunk moves or goes, not when one comes.
    num_in_memory : int
        Blocks in memory, which is as many chunks.
    num_dropped, num_rebuilt : int
        Chunks that were given up, and those of them that came again.
    """

    def __init__(self, layout: ChunkLayout) -> None:
        self.lock = threading.Lock()
        self.version = 0
        self.num_in_memory = 0
        self.num_dropped = 0
        self.num_rebuilt = 0
        self._layout = layout
        self._lost: set[int] = set()
        self._places: dict[int, int] = {}
        self._blocks: dict[int, Block] = {}
        self._alive: dict[int, int] = {}
        self._tails: dict[Lane, dict[int, Block]] = {}

    def __contains__(self, slot: int) -> bool:
        return slot in self._places

    @property
    def slots(self) -> list[int]:
        """Every chunk that is held."""
        return list(self._places)

    @property
    def files(self) -> list[Block]:
        """Every block that lies in a file."""
        return [block for block in self._blocks.values() if block.codes is None]

    @property
    def lanes(self) -> list[Lane]:
        """Lanes that have a tail."""
        return list(self._tails)

    def tail(self, lane: Lane, most: int | None = None) -> list[Block]:
        """Return the first blocks of a lane's tail."""
        return list(islice(self._tails.get(lane, {}).values(), most))

    def oldest_tail(self) -> list[Block]:
        """Return the blocks of the tail that began first, if there is one."""
        return [block for tail in islice(self._tails.values(), 1) for block in tail.values()]

    def longest_tail(self) -> Lane:
        """Return the lane with most blocks in memory, of which there must be some."""
        return max(self._tails, key=lambda lane: len(self._tails[lane]))

    def hold(self, block: Block, columns: Collection[int]) -> list[Block]:
        """Put chunks where a block has them; return the blocks of files that are dead then."""
        if not columns:
            return [block]
        places = {block.slots[column]: place_at(block.number, column) for column in columns}
        before = [self._places[slot] for slot in places if slot in self._places]
        rebuilt = self._lost.intersection(places)
        self.num_rebuilt += len(rebuilt)
        self._lost -= rebuilt
        self._places |= places
        self._blocks[block.number] = block
        self._alive[block.number] = len(places)
        if block.codes is not None:
            self._tails.setdefault(block.lane, {})[block.number] = block
            self.num_in_memory += 1
        return self._leave(before)

    def move(self, parts: Sequence[Block], block: Block) -> list[Block]:
        """Put what is still alive of blocks of one chunk into one of all of them, in order."""
        columns = [column for column, part in enumerate(parts) if self.alive(part)]
        return self.hold(block, columns)

    def release(self, slots: Collection[int]) -> list[Block]:
        """Forget chunks; return the blocks of files that are dead then."""
        self._lost.difference_update(slots)
        places = [self._places.pop(slot, _NOWHERE) for slot in slots]
        return self._leave([place for place in places if place != _NOWHERE])

    def give_up(self, blocks: Iterable[Block]) -> list[Block]:
        """Let go of blocks and of what is alive in them; return those that were in files."""
        slots = [slot for block in blocks for slot in self.alive(block)]
        dead = self.release(slots)
        self._lost.update(slots)
        self.num_dropped += len(slots)
        return dead

    def thin(self, slots: Collection[int]) -> list[Block]:
        """Return the blocks of some chunks that would be too empty to keep without them.

        So dead columns take at most half as much room as those that are alive.
        """
        places = [self._places.get(slot, _NOWHERE) for slot in slots]
        dying = Counter(place >> COLUMN_BITS for place in places if place != _NOWHERE)
        blocks = [(self._blocks[number], count) for number, count in dying.items()]
        return [
            block
            for block, count in blocks
            if 3 * (self._alive[block.number] - count) < 2 * len(block.slots)
        ]

    def alive(self, block: Block) -> list[int]:
        """Return the slots that lie in a block."""
        places = enumerate(block.slots, place_at(block.number, 0))
        return [slot for place, slot in places if self._places.get(slot) == place]

    def block(self, number: int) -> Block | None:
        """Return a block, if it is still there."""
        return self._blocks.get(number)

    def find(self, slots: Ints, known: Found | None) -> Found:
        """Look chunks up; see ``ChannelStore.find``."""
        places = np.empty(0, np.int64)
        if known is not None and known.version == self.version and not len(known.missing):
            if np.array_equal(slots, known.slots):
                return known
            if np.array_equal(slots[: len(known.slots)], known.slots):
                places = known.places
        rest = slots[len(places) :].tolist()
        looked_up = map(self._places.get, rest, repeat(_NOWHERE))
        places = np.append(places, np.fromiter(looked_up, np.int64, len(rest)))
        return self._found(slots.copy(), places)

    def check_integrity(self) -> None:
        """Raise AssertionError if the invariant does not hold."""
        alive = {number: len(self.alive(block)) for number, block in self._blocks.items()}
        assert alive == self._alive
        assert all(alive.values())
        assert sum(alive.values()) == len(self._places)
        tails = {number: block for tail in self._tails.values() for number, block in tail.items()}
        in_memory = {n: block for n, block in self._blocks.items() if block.codes is not None}
        assert tails == in_memory
        assert len(tails) == self.num_in_memory
        assert all(self._tails.values())

    def _found(self, slots: Ints, places: Ints) -> Found:
        layout = self._layout
        is_missing = places == _NOWHERE
        numbers, block = np.unique(places >> COLUMN_BITS, return_inverse=True)
        if is_missing.any():  # they come first
            numbers, block = numbers[1:], block - 1
        blocks = tuple(self._blocks[number] for number in numbers.tolist())
        scales = np.empty((len(blocks), layout.num_kv_heads, layout.key_dim), np.float32)
        means = np.empty((len(blocks), layout.num_kv_heads, layout.value_dim), np.float32)
        for index, each in enumerate(blocks):
            scales[index] = each.scales
            means[index] = each.value_means
        return Found(
            slots,
            block,
            np.where(is_missing, 0, places & (1 << COLUMN_BITS) - 1),
            np.flatnonzero(is_missing),
            blocks,
            np.array([each.start for each in blocks], np.int64),
            np.array([len(each.slots) for each in blocks], np.int64) * layout.chunk_tokens,
            np.array([each.codes is None for each in blocks], np.bool_),
            scales,
            means,
            places,
            self.version,
        )

    def _leave(self, places: Sequence[int]) -> list[Block]:
        """Count chunks out of their blocks; return those of files in which none is alive."""
        dead = []
        for place in places:
            number = place >> COLUMN_BITS
            self._alive[number] -= 1
            if self._alive[number]:
                continue
            del self._alive[number]
            block = self._blocks.pop(number)
            if block.codes is None:
                dead.append(block)
            else:
                self._cut(block)
        self.version += bool(places)
        return dead

    def _cut(self, block: Block) -> None:
        self.num_in_memory -= 1
        tail = self._tails[block.lane]
        del tail[block.number]
        if not tail:
            del self._tails[block.lane]


def place_at(block: int, column: int) -> int:
    """Return the place of a column of a block."""
    return block << COLUMN_BITS | column
