"""Any sequence of calls on a store and its reader of rows, against a dictionary of bytes."""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.support.rows import HEADS, Ints, open_shelf
from tests.support.stores import LAYOUT, put

MAX_CHUNKS = 12
NUM_IDS = 6


class RowReaderMachine(RuleBasedStateMachine):
    """One row of chunks, which grows, shrinks and moves; rows of it are read meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="row-machine-"))
        self.stack = ExitStack()
        self.seed = 1

    @initialize(
        memory_chunks=st.integers(0, 6),
        num_buffers=st.integers(1, 9),
        line_bytes=st.sampled_from([0, 1 << 10, 1 << 14]),
    )
    def open(self, memory_chunks: int, num_buffers: int, line_bytes: int) -> None:
        self.shelf = self.stack.enter_context(
            open_shelf(
                self.directory / "disk",
                3,
                memory_chunks=memory_chunks,
                num_buffers=num_buffers,
                line_bytes=line_bytes,
            )
        )

    def draw_ids(self, data: st.DataObject) -> Ints:
        token = st.integers(-1, len(self.shelf.chunks) * LAYOUT.chunk_tokens - 1)
        one = st.lists(token, min_size=NUM_IDS, max_size=NUM_IDS)
        return np.array([data.draw(one) for _ in HEADS], dtype=np.int64)

    @precondition(lambda self: len(self.shelf.chunks) < MAX_CHUNKS)
    @rule(count=st.integers(1, 3), waits=st.booleans())
    def grow(self, count: int, waits: bool) -> None:
        self.seed += 1
        self.shelf.contents |= put(self.shelf.store, count, self.seed)
        if waits:
            self.shelf.store.drain()

    @precondition(lambda self: len(self.shelf.chunks) > 1)
    @rule(count=st.integers(1, 4))
    def crop(self, count: int) -> None:
        gone = self.shelf.chunks[1:][-count:]
        self.shelf.store.release(gone)
        for chunk in gone:
            del self.shelf.contents[chunk]

    @rule(slots=st.integers(0, 5))
    def shrink(self, slots: int) -> None:
        self.shelf.store.shrink(0, slots)

    @rule(data=st.data())
    def locate(self, data: st.DataObject) -> None:
        ids = self.draw_ids(data)
        assert ((self.shelf.locate(ids) != 0) == (ids >= 0)).all()

    @rule(data=st.data(), deadline_s=st.sampled_from([0.0, 0.0005]))
    def locate_in_time(self, data: st.DataObject, deadline_s: float) -> None:
        ids = self.draw_ids(data)
        late = self.shelf.counters.late_rows
        found = self.shelf.locate(ids, deadline_s)
        missing = np.count_nonzero((found == 0) & (ids >= 0))
        assert self.shelf.counters.late_rows - late == missing

    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        ids = self.draw_ids(data)
        found = self.shelf.locate(ids, 0.0)
        self.shelf.prefetch(self.draw_ids(data))
        self.shelf.check(ids, found)

    @rule()
    def release(self) -> None:
        self.shelf.reader.release()

    @rule()
    def settle(self) -> None:
        self.shelf.reader.settle()
        self.shelf.check_nothing_left()

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "shelf"):
            self.shelf.reader._lines.check_integrity()

    def teardown(self) -> None:
        self.stack.close()
        shutil.rmtree(self.directory)


RowReaderMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20)
TestRowReaderMachine = RowReaderMachine.TestCase
