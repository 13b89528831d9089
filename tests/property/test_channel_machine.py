"""Any sequence of calls on a store of keys by channel, against the set of what it should hold."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.channels import BLOCK_CHUNKS, CHUNK_BYTES, assert_holds, find, open_store, put
from tests.support.disk import FlakyCall, fail_with

if TYPE_CHECKING:
    from offload.tiers.near.channel_table import Found

NUM_LANES = 3
SLOTS = st.lists(st.integers(0, 40), max_size=12)


class ChannelMachine(RuleBasedStateMachine):
    """One store, opened again and again, whose disk is full at times."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="channel-machine-"))
        self.held: set[int] = set()
        self.known: Found | None = None
        self.pwritev = FlakyCall(os.pwritev, fail_with(errno.ENOSPC), armed=False)

    @initialize(memory_chunks=st.integers(1, 15))
    def open(self, memory_chunks: int) -> None:
        self.memory_chunks = memory_chunks
        self.store = open_store(self.directory, memory_chunks=memory_chunks, pwritev=self.pwritev)
        self.known = None

    @rule(slots=SLOTS.filter(bool), data=st.data())
    def add(self, slots: list[int], data: st.DataObject) -> None:
        lanes = [(0, data.draw(st.integers(0, NUM_LANES - 1))) for _ in slots]
        dropped = self.store.stats()["dropped"]
        put(self.store, slots, lanes)
        self.held.update(slots)
        if self.pwritev.armed:  # the limit on memory may have dropped some
            self.held.intersection_update(self.store.slots)
        else:
            assert self.store.stats()["dropped"] == dropped

    @rule(slots=SLOTS)
    def forget(self, slots: list[int]) -> None:
        self._let_go(self.held.difference(slots), lambda: self.store.forget(slots))

    @rule(slots=SLOTS)
    def retain(self, slots: list[int]) -> None:
        self._let_go(self.held.intersection(slots), lambda: self.store.retain(slots))

    def _let_go(self, alive: set[int], forget: Callable[[], None]) -> None:
        """Forget; blocks that become too empty go, with what was alive in them."""
        before = self.store.stats()["dropped"]
        forget()
        self.held = alive.intersection(self.store.slots)
        assert self.store.stats()["dropped"] - before == len(alive) - len(self.held)

    @rule(slots=SLOTS, data=st.data())
    def find_and_read(self, slots: list[int], data: st.DataObject) -> None:
        self.known = find(self.store, slots, self.known)
        missing = [index for index, slot in enumerate(slots) if slot not in self.held]
        assert self.known.missing.tolist() == missing
        found = [slot for slot in slots if slot in self.held]
        heads = st.sets(st.integers(0, 7), min_size=2, max_size=2)
        channels = np.array([sorted(data.draw(heads)) for _ in range(2)])
        assert_holds(self.store, found, channels)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        found = find(self.store, sorted(self.held))
        if found.blocks:
            index = data.draw(st.integers(0, len(found.blocks) - 1))
            self.store.drop(found.blocks[index].number)
            self.held.difference_update(found.slots[found.block == index].tolist())

    @rule(is_full=st.booleans())
    def fill_disk(self, is_full: bool) -> None:
        self.pwritev.armed = is_full

    @rule()
    def flush_and_open_again(self) -> None:
        self.pwritev.armed = False
        self.store.flush()
        assert self.store.stats()["tail_bytes"] == 0
        self.store.close()
        self.open(self.memory_chunks)
        assert self.store.stats()["damaged"] == 0
        assert self.held.issubset(self.store.slots)
        self._let_go(set(self.held), lambda: self.store.retain(self.held))  # dead ones are back

    @invariant()
    def nothing_is_lost_or_left(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check_integrity()
        assert set(self.store.slots) == self.held
        stats = self.store.stats()
        assert stats["tail_bytes"] <= self.memory_chunks * CHUNK_BYTES
        assert len(list(self.directory.iterdir())) == stats["blocks"]
        if not stats["failed"]:
            assert stats["tail_bytes"] <= NUM_LANES * (BLOCK_CHUNKS - 1) * CHUNK_BYTES

    def teardown(self) -> None:
        try:
            if hasattr(self, "store"):
                self.store.close(remove=True)
                assert not list(self.directory.iterdir())
        finally:
            shutil.rmtree(self.directory)


ChannelMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestChannelMachine = ChannelMachine.TestCase
