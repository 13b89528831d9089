"""Any sequence of calls on a store over three tiers, against a dictionary of bytes."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor

from offload import stats
from offload.errors import CapacityError
from offload.store import ChunkStore
from offload.tiers.base import Tier
from offload.tiers.disk import DiskTier
from offload.tiers.eviction import EvictionPolicy, KeepFirst, LeastRecentlyUsed
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import as_chunk, page_aligned
from offload.types import PAGE_BYTES, ChunkId, ChunkLayout, SlotId

LAYOUT = ChunkLayout(1, 2, 2, 2, torch.float32)
MEMORY_SLOTS = 4
DISK_SLOTS = 8
WRITE_BUFFERS = 4
DEADLINE_S = 60.0


def make_tiers(directory: Path) -> list[Tier]:
    """Make tiers so small that a few puts fill them."""
    device, size = torch.device("cpu"), MEMORY_SLOTS * LAYOUT.slot_bytes
    record_bytes = PAGE_BYTES + LAYOUT.slot_bytes
    return [
        MemoryTier("gpu", capacity_bytes=size, layout=LAYOUT, device=device),
        MemoryTier("cpu", capacity_bytes=size, layout=LAYOUT, device=device),
        DiskTier(
            directory,
            capacity_bytes=DISK_SLOTS * record_bytes,
            layout=LAYOUT,
            num_threads=2,
            segment_bytes=3 * record_bytes,
            deadline_s=DEADLINE_S,
        ),
    ]


class StoreMachine(RuleBasedStateMachine):
    """Holds for every chunk what its bytes are, who refers to it, and who protects it."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="store-machine-"))
        self.tiers = self.make_tiers()
        self.content: dict[ChunkId, Tensor] = {}
        self.references: Counter[ChunkId] = Counter()
        self.protections: Counter[ChunkId] = Counter()
        self.slots_when_protected: dict[ChunkId, dict[int, SlotId]] = {}
        self.num_tokens = 0

    def make_tiers(self) -> list[Tier]:
        return make_tiers(self.directory)

    def check_content(self, chunk: ChunkId) -> None:
        assert torch.equal(self.store.read_chunk(chunk), self.content[chunk])

    @initialize(
        policy=st.sampled_from([KeepFirst, LeastRecentlyUsed]), positions=st.integers(1, 12)
    )
    def open(self, policy: type[EvictionPolicy], positions: int) -> None:
        buffers = page_aligned(WRITE_BUFFERS * LAYOUT.slot_bytes).view(WRITE_BUFFERS, -1)
        self.counters = stats.Counters()
        self.store = ChunkStore(
            self.tiers,
            [policy() for _ in self.tiers],
            LAYOUT,
            list(buffers),
            self.counters,
            DEADLINE_S,
        )
        self.put_some(1, positions, 0)

    def draw(self, data: st.DataObject, chunks: Counter[ChunkId]) -> ChunkId:
        return data.draw(st.sampled_from(sorted(+chunks)))

    def living(self) -> set[ChunkId]:
        return set(+self.references) | set(+self.protections)

    def settle(self) -> None:
        """Wait for stores of released chunks: what they hold must not depend on the threads."""
        if set(self.store.table) != self.living():
            self.store.drain()

    def num_duplicates(self) -> int:
        """Count the second copies on disk, which give way when room is short."""
        entries = [self.store.table[chunk] for chunk in self.store.table]
        last = len(self.tiers) - 1
        return sum(
            last in entry.slots and len(entry.slots) > 1 and not entry.protect_count
            for entry in entries
        )

    @rule(batch=st.integers(1, 2), positions=st.integers(1, 6), layer=st.integers(0, 1))
    def put(self, batch: int, positions: int, layer: int) -> None:
        self.put_some(batch, positions, layer)

    def put_some(self, batch: int, positions: int, layer: int) -> None:
        shape = (batch, LAYOUT.num_kv_heads, positions * LAYOUT.chunk_tokens, 2)
        count = torch.Size(shape).numel()
        keys = torch.arange(count, dtype=torch.float32).view(shape) + 1000 * self.num_tokens
        values = -keys
        self.settle()
        free = sum(tier.num_free for tier in self.tiers) + self.num_duplicates()
        fits = batch * positions <= free
        try:
            columns = self.store.put(layer, self.num_tokens, keys, values)
        except CapacityError:
            # Rows of a position go to one tier together, and protected chunks stay where they are.
            assert not fits or batch > 1 or self.protections
            self.settle()
            assert set(self.store.table) == self.living()
            return
        assert fits
        assert [len(column) for column in columns] == [batch] * positions
        for position, column in enumerate(columns):
            tokens = slice(position * LAYOUT.chunk_tokens, (position + 1) * LAYOUT.chunk_tokens)
            for row, chunk in enumerate(column):
                both = torch.cat([keys[row, :, tokens], values[row, :, tokens]], -1)
                assert chunk not in self.content, "an id was used twice"
                self.content[chunk] = both
                self.references[chunk] = 1
        self.num_tokens += positions * LAYOUT.chunk_tokens

    @precondition(lambda self: +self.references)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chunk = self.draw(data, self.references)
        self.references[chunk] -= 1
        self.store.release([chunk])

    @precondition(lambda self: +self.references)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        chunk = self.draw(data, self.references)
        self.references[chunk] += 1
        self.store.table.share([chunk])

    @precondition(lambda self: +self.references)
    @rule(data=st.data())
    def protect(self, data: st.DataObject) -> None:
        chunk = self.draw(data, self.references)
        self.protections[chunk] += 1
        self.slots_when_protected.setdefault(chunk, dict(self.store.table[chunk].slots))
        self.store.table.protect([chunk])

    @precondition(lambda self: +self.protections)
    @rule(data=st.data())
    def unprotect(self, data: st.DataObject) -> None:
        chunk = self.draw(data, self.protections)
        self.protections[chunk] -= 1
        if not self.protections[chunk]:
            del self.protections[chunk], self.slots_when_protected[chunk]
        self.store.unprotect([chunk])

    def make_room(self, level: int, kept: ChunkId) -> None:
        """Drop every reference to one chunk of a full tier."""
        if self.tiers[level].num_free:
            return
        for chunk, count in (+self.references).items():
            if level in self.store.table[chunk].slots and chunk != kept:
                self.store.release([chunk] * count)
                self.references[chunk] = 0
                return

    @precondition(lambda self: +self.references)
    @rule(data=st.data(), level=st.integers(0, 1))
    def promote(self, data: st.DataObject, level: int) -> None:
        protected = self.protections & self.references
        chunk = self.draw(data, protected if protected else self.references)
        content = page_aligned(LAYOUT.slot_bytes)
        as_chunk(content, LAYOUT).copy_(self.content[chunk])
        self.store.drain()
        self.make_room(level, chunk)
        before = self.store.level_of(chunk)
        promoted = self.store.promote(chunk, level, content)
        assert self.store.level_of(chunk) == (level if promoted else before)

    @precondition(lambda self: +self.references)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.store.touch([self.draw(data, self.references)])

    @precondition(lambda self: not self.protections)
    @rule(level=st.integers(0, 1), num_slots=st.integers(0, MEMORY_SLOTS))
    def shrink(self, level: int, num_slots: int) -> None:
        self.settle()
        room = sum(tier.num_free for tier in self.tiers[level + 1 :]) + self.num_duplicates()
        entries = map(self.store.table.__getitem__, self.store.table)
        beyond = sum(entry.slots.get(level, -1) >= num_slots for entry in entries)
        try:
            self.store.shrink(level, num_slots)
        except CapacityError:
            assert room < beyond

    @rule()
    def drain(self) -> None:
        self.store.drain()
        assert set(self.store.table) == self.living()

    @rule()
    def read_everything(self) -> None:
        for chunk in +self.references:
            self.check_content(chunk)

    @invariant()
    def chunks_in_memory_read_back(self) -> None:
        for chunk in +self.references:
            if self.store.level_of(chunk) != len(self.tiers) - 1:
                self.check_content(chunk)

    @invariant()
    def protected_copies_stay(self) -> None:
        for chunk, slots in self.slots_when_protected.items():
            assert slots.items() <= self.store.table[chunk].slots.items()

    @invariant()
    def table_and_tiers_agree(self) -> None:
        self.store.check_integrity()
        for chunk in +self.references:
            assert self.store.table[chunk].ref_count == self.references[chunk]

    @invariant()
    def capacities_are_kept(self) -> None:
        for level, tier in enumerate(self.tiers):
            assert tier.used_bytes <= self.store.peak_bytes(level) <= tier.capacity_bytes

    def teardown(self) -> None:
        self.read_everything()
        self.store.drain()
        for chunk, count in self.protections.items():
            self.store.unprotect([chunk] * count)
        for chunk, count in (+self.references).items():
            self.store.release([chunk] * count)
        assert len(self.store.table) == 0
        assert all(tier.used_bytes == 0 for tier in self.tiers)
        self.store.close()
        assert list(self.directory.iterdir()) == []
        shutil.rmtree(self.directory)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(stateful_step_count=40)
