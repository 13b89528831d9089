"""Any sequence of calls on a store whose chunks change places, on a disk that may fail."""

import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from offload.errors import CapacityError
from offload.placement import FIRST, PLACEMENTS
from offload.tiers.faults import FaultPlan
from offload.types import ChunkId
from tests.support.exchanges import open_exchanges
from tests.support.stores import check, put

NUMBERS = st.integers(0, 1000)


class ExchangeMachine(RuleBasedStateMachine):
    """Chunks with references and protections; attention goes anywhere, transfers fail anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="exchange-machine-"))
        self.stack = ExitStack()
        self.references: Counter[ChunkId] = Counter()
        self.protections: Counter[ChunkId] = Counter()
        self.seed = 1

    @initialize(
        placement=st.sampled_from([name for name in PLACEMENTS if name != FIRST]),
        memory=st.sampled_from([(4,), (2, 3), (0, 4)]),
        disk_slots=st.integers(6, 12),
        most=st.integers(1, 4),
        fail=st.sampled_from([0.0, 0.3]),
    )
    def open(
        self, placement: str, memory: tuple[int, ...], disk_slots: int, most: int, fail: float
    ) -> None:
        self.found = self.stack.enter_context(
            open_exchanges(
                self.directory / "disk",
                8,
                placement=placement,
                memory=memory,
                disk_slots=disk_slots,
                most=most,
                faults=FaultPlan(fail=fail),
            )
        )
        self.references.update(self.found.chunks)

    def pick(self, chunks: Counter[ChunkId], number: int) -> ChunkId | None:
        """Return a chunk by its number among those there are; None if there are none.

        How many there are depends on the transfers behind: so it must not decide what is drawn.
        """
        there = sorted(+chunks)
        return there[number % len(there)] if there else None

    @rule(count=st.integers(1, 3), layer=st.integers(0, 2))
    def put(self, count: int, layer: int) -> None:
        self.seed += 1
        try:
            chunks = put(self.found.store, count, self.seed, layer)
        except CapacityError:
            return
        self.found.contents |= chunks
        self.references.update(list(chunks))

    @rule(number=NUMBERS)
    def release(self, number: int) -> None:
        chunk = self.pick(self.references, number)
        if chunk is None:
            return
        self.references[chunk] -= 1
        self.found.store.release([chunk])
        if not self.references[chunk]:
            self.found.contents.pop(chunk)

    @rule(number=NUMBERS)
    def share(self, number: int) -> None:
        chunk = self.pick(self.references, number)
        if chunk is None:
            return
        self.references[chunk] += 1
        self.found.store.table.share([chunk])

    @rule(number=NUMBERS)
    def protect(self, number: int) -> None:
        chunk = self.pick(self.references, number)
        if chunk is None:
            return
        self.protections[chunk] += 1
        self.found.store.table.protect([chunk])

    @rule(number=NUMBERS)
    def unprotect(self, number: int) -> None:
        chunk = self.pick(self.protections, number)
        if chunk is None:
            return
        self.protections[chunk] -= 1
        self.found.store.unprotect([chunk])

    @rule(shares=st.dictionaries(NUMBERS, st.floats(0, 1), max_size=6), rounds=st.integers(1, 4))
    def observe(self, shares: dict[int, float], rounds: int) -> None:
        picked = ((self.pick(self.references, number), mass) for number, mass in shares.items())
        masses = {chunk: mass for chunk, mass in picked if chunk is not None}
        self.found.arm()
        for _ in range(rounds):
            self.found.exchange.observe(masses)
        self.found.arm(is_armed=False)

    @rule()
    def settle(self) -> None:
        self.found.exchange.settle()

    @rule(slots=st.integers(0, 4))
    def shrink(self, slots: int) -> None:
        if +self.protections:
            return
        try:
            self.found.store.shrink(0, slots)
        except CapacityError:
            self.found.exchange.settle()

    @rule()
    def read_everything(self) -> None:
        check(self.found.store, self.found.contents)

    @invariant()
    def books_balance(self) -> None:
        store = self.found.store
        store.check_integrity()
        for chunk, count in (+self.references).items():
            assert store.table[chunk].ref_count == count
        for level, tier in enumerate(store.tiers):
            assert tier.used_bytes <= store.peak_bytes(level) <= tier.capacity_bytes

    @invariant()
    def chunks_in_memory_read_back(self) -> None:
        store, bottom = self.found.store, len(self.found.store.tiers) - 1
        held = self.found.contents.items()
        check(store, {chunk: content for chunk, content in held if store.level_of(chunk) < bottom})

    def teardown(self) -> None:
        for chunk, count in (+self.protections).items():
            self.found.store.unprotect([chunk] * count)
        self.found.check_nothing_left()
        for chunk, count in (+self.references).items():
            self.found.store.release([chunk] * count)
        assert len(self.found.store.table) == 0
        assert all(tier.used_bytes == 0 for tier in self.found.store.tiers)
        self.found.contents.clear()
        self.stack.close()
        shutil.rmtree(self.directory)


TestExchange = ExchangeMachine.TestCase
TestExchange.settings = settings(stateful_step_count=40)
