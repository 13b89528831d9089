"""A store of blocks against a dict: what it gives is what was stored, or nothing."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.blocks import RECORD_BYTES, flip_bit, load_blocks, make_store, store_blocks

SLOTS = 5
names = st.lists(st.sampled_from([b"%d" % number for number in range(9)]), max_size=4, unique=True)


class BlockStoreMachine(RuleBasedStateMachine):
    """``content`` of a name never changes, so ``load_blocks`` compares every row it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = make_store(Path(self.folder.name), SLOTS)
        self.recent: dict[bytes, None] = {}
        self.is_sound = True

    @rule(chosen=names)
    def store_some(self, chosen: list[bytes]) -> None:
        assert store_blocks(self.store, chosen) == [True] * len(chosen)
        self.use(chosen)

    @rule(chosen=names)
    def load_some(self, chosen: list[bytes]) -> None:
        held = [self.store.holds(name) for name in chosen]
        arrived = load_blocks(self.store, chosen)
        assert arrived == held or not self.is_sound
        self.use([name for name, good in zip(chosen, arrived, strict=True) if good])

    @rule(chosen=names)
    def touch_some(self, chosen: list[bytes]) -> None:
        self.store.touch(chosen)
        self.use([name for name in chosen if self.store.holds(name)])

    @rule()
    def open_again(self) -> None:
        held = {name for name in self.recent if self.store.holds(name)}
        self.store.close()
        self.store = make_store(Path(self.folder.name), SLOTS)
        found = {name for name in self.recent if self.store.holds(name)}
        assert held == found or not self.is_sound
        # Recency is not kept, so from here on only what is found is known, not what goes first.
        self.recent.clear()

    @rule(slot=st.integers(0, SLOTS - 1), offset=st.integers(0, RECORD_BYTES - 1))
    def flip(self, slot: int, offset: int) -> None:
        segments = list(self.store.folder.glob("*.kvseg"))
        if segments and segments[0].stat().st_size >= (slot + 1) * RECORD_BYTES:
            flip_bit(self.store, slot, offset)
            self.is_sound = False

    @invariant()
    def books_balance_and_the_latest_are_held(self) -> None:
        self.store.check_integrity()
        assert self.store.num_blocks <= SLOTS
        if self.is_sound:
            assert all(self.store.holds(name) for name in list(self.recent)[-SLOTS:])

    def use(self, chosen: list[bytes]) -> None:
        for name in chosen:
            self.recent.pop(name, None)
            self.recent[name] = None

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


TestBlockStoreMachine = BlockStoreMachine.TestCase
TestBlockStoreMachine.settings = settings(max_examples=25, stateful_step_count=20)
