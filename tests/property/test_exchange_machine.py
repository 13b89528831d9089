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
    precondition,
    rule,
)

from offload.errors import CapacityError
from offload.placement import FIRST, PLACEMENTS
from offload.tiers.faults import FaultPlan
from offload.types import ChunkId
from tests.support.exchanges import open_exchanges
from tests.support.stores import check, put


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

    def draw(self, data: st.DataObject, chunks: Counter[ChunkId]) -> ChunkId:
        return data.draw(st.sampled_from(sorted(+chunks)))

    @rule(count=st.integers(1, 3), layer=st.integers(0, 2))
    def put(self, count: int, layer: int) -> None:
        self.seed += 1
        try:
            chunks = put(self.found.store, count, self.seed, layer)
        except CapacityError:
            return
        self.found.contents |= chunks
        self.references.update(list(chunks))

    @precondition(lambda self: +self.references)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chunk = self.draw(data, self.references)
        self.references[chunk] -= 1
        self.found.store.release([chunk])
        if not self.references[chunk]:
            self.found.contents.pop(chunk)

    @precondition(lambda self: +self.references)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        chunk = self.draw(data, self.references)
        self.references[chunk] += 1
        self.found.store.table.share([chunk])

    @precondition(lambda self: +self.references)
    @rule(data=st.data())
    def protect(self, data: st.DataObject) -> None:
        chunk = self.draw(data, self.references)
        self.protections[chunk] += 1
        self.found.store.table.protect([chunk])

    @precondition(lambda self: +self.protections)
    @rule(data=st.data())
    def unprotect(self, data: st.DataObject) -> None:
        chunk = self.draw(data, self.protections)
        self.protections[chunk] -= 1
        self.found.store.unprotect([chunk])

    @precondition(lambda self: +self.references)
    @rule(data=st.data(), rounds=st.integers(1, 4))
    def observe(self, data: st.DataObject, rounds: int) -> None:
        chunks = sorted(+self.references)
        masses = data.draw(st.dictionaries(st.sampled_from(chunks), st.floats(0, 1), max_size=6))
        self.found.arm()
        for _ in range(rounds):
            self.found.exchange.observe(masses)
        self.found.arm(is_armed=False)

    @rule()
    def settle(self) -> None:
        self.found.exchange.settle()

    @precondition(lambda self: not +self.protections)
    @rule(slots=st.integers(0, 4))
    def shrink(self, slots: int) -> None:
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
