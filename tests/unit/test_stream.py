"""The stream: what loads when, and what is left after a wrong guess or a failed load."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from offload.errors import CorruptChunk, TransferTimeout
from offload.prefetch.plan import LoadGroup
from offload.prefetch.stream import ChunkStream
from offload.stats import Counters
from offload.tiers.transfer import FutureTransfer
from offload.types import ChunkId

WAIT_S = 30.0


def group(*chunks: int) -> LoadGroup:
    return LoadGroup(chunks[0], len(chunks), tuple(ChunkId(chunk) for chunk in chunks))


A, B, C, D, E, F = (group(i) for i in range(6))


class GatedLoader:
    """Loads that end when their gate opens, on a thread of their own; fills buffers with groups."""

    def __init__(self, num_buffers: int, executor: ThreadPoolExecutor) -> None:
        self.content: list[LoadGroup | None] = [None] * num_buffers
        self.started: list[LoadGroup] = []
        self.released: list[tuple[LoadGroup, bool]] = []
        self.failures: dict[LoadGroup, Exception] = {}
        self.refusals: dict[LoadGroup, Exception] = {}
        self.closed_gates: dict[LoadGroup, threading.Event] = {}
        self._busy: set[int] = set()
        self._executor = executor

    def hold(self, held: LoadGroup) -> threading.Event:
        """Keep a load from ending until the returned event is set."""
        return self.closed_gates.setdefault(held, threading.Event())

    def start(self, wanted: LoadGroup, buffer: int) -> FutureTransfer:
        if wanted in self.refusals:
            raise self.refusals.pop(wanted)
        assert buffer not in self._busy, "the buffer is in use"
        self._busy.add(buffer)
        self.started.append(wanted)
        future: Future[None] = self._executor.submit(self._load, wanted, buffer)
        return FutureTransfer(f"load of chunk {wanted.chunks[0]}", 1, [future])

    def release(self, wanted: LoadGroup, buffer: int, *, used: bool) -> None:
        self._busy.remove(buffer)
        self.released.append((wanted, used))

    def _load(self, wanted: LoadGroup, buffer: int) -> None:
        gate = self.closed_gates.get(wanted)
        if gate is not None:
            assert gate.wait(WAIT_S)
        if wanted in self.failures:
            raise self.failures.pop(wanted)
        self.content[buffer] = wanted


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


@pytest.fixture
def loader(executor: ThreadPoolExecutor) -> Iterator[GatedLoader]:
    loader = GatedLoader(3, executor)
    yield loader
    for gate in loader.closed_gates.values():
        gate.set()


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def stream(loader: GatedLoader, counters: Counters) -> ChunkStream:
    return ChunkStream(loader, 3, counters, deadline_s=WAIT_S)


def read_all(
    stream: ChunkStream,
    loader: GatedLoader,
    groups: Sequence[LoadGroup],
    upcoming: Sequence[LoadGroup] = (),
) -> None:
    """Read groups, checking that each comes in turn and in a buffer that holds it."""
    seen = []
    for found, buffer in stream.read(groups, upcoming):
        assert loader.content[buffer] == found
        seen.append(found)
    assert seen == list(groups)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 6])
def test_read_yields_every_group_in_order_with_its_buffer(
    stream: ChunkStream, loader: GatedLoader, num_groups: int
) -> None:
    groups = [A, B, C, D, E, F][:num_groups]
    read_all(stream, loader, groups)
    assert loader.started == groups
    assert loader.released == [(each, True) for each in groups]


def test_next_groups_load_while_one_is_in_use(stream: ChunkStream, loader: GatedLoader) -> None:
    reading = stream.read([A, B, C, D], [])
    next(reading)
    assert loader.started == [A, B, C]
    next(reading)
    assert loader.started == [A, B, C, D]
    reading.close()


def test_end_of_a_layer_loads_what_the_next_layer_needs(
    stream: ChunkStream, loader: GatedLoader, counters: Counters
) -> None:
    read_all(stream, loader, [A], upcoming=[B, C, D, E])
    assert loader.started == [A, B, C, D]
    read_all(stream, loader, [B, C, D, E], upcoming=[])
    assert loader.started == [A, B, C, D, E]
    assert (counters.demanded_groups, counters.prefetched_groups) == (1, 4)


def test_only_layer_loads_its_own_groups_for_the_next_step(
    stream: ChunkStream, loader: GatedLoader, counters: Counters
) -> None:
    for _ in range(3):
        read_all(stream, loader, [A, B], upcoming=[A, B])
    assert loader.started == [A, B] * 4
    assert (counters.demanded_groups, counters.prefetched_groups) == (1, 5)


def test_wrong_guess_gives_its_buffer_to_what_is_needed(
    stream: ChunkStream, loader: GatedLoader
) -> None:
    read_all(stream, loader, [A], upcoming=[B, C, D])
    read_all(stream, loader, [E, F], upcoming=[])
    assert loader.started == [A, B, C, D, E, F]
    assert loader.released.count((B, False)) == 1


def test_wrong_guess_in_flight_is_awaited_before_its_buffer_is_filled_again(
    stream: ChunkStream, loader: GatedLoader, executor: ThreadPoolExecutor
) -> None:
    gate = loader.hold(B)
    read_all(stream, loader, [A], upcoming=[B, C, D])
    reading = executor.submit(read_all, stream, loader, [E], [])
    assert not reading.done()
    assert E not in loader.started
    gate.set()
    reading.result(WAIT_S)
    assert loader.content.count(E) == 1


def test_wrong_guess_that_failed_is_counted_and_forgotten(
    stream: ChunkStream, loader: GatedLoader, counters: Counters
) -> None:
    loader.failures[B] = CorruptChunk("B is damaged")
    read_all(stream, loader, [A], upcoming=[B, C, D])
    read_all(stream, loader, [E, F], upcoming=[])
    assert counters.failed_prefetches == 1
    assert loader.released.count((B, False)) == 1


@pytest.mark.parametrize("failed", [A, B, C])
def test_failed_load_raises_and_leaves_every_buffer_usable(
    stream: ChunkStream, loader: GatedLoader, failed: LoadGroup
) -> None:
    for _ in range(5):
        loader.failures[failed] = CorruptChunk("damaged")
        with pytest.raises(CorruptChunk, match="damaged"):
            read_all(stream, loader, [A, B, C], upcoming=[])
    read_all(stream, loader, [A, B, C, D], upcoming=[])


@pytest.mark.parametrize("refused", [A, B, C])
def test_load_that_cannot_start_raises_and_leaves_every_buffer_usable(
    stream: ChunkStream, loader: GatedLoader, refused: LoadGroup
) -> None:
    for _ in range(5):
        loader.refusals[refused] = TransferTimeout("no room in the queue")
        with pytest.raises(TransferTimeout, match="no room"):
            read_all(stream, loader, [A, B, C], upcoming=[])
    read_all(stream, loader, [A, B, C, D], upcoming=[])


def test_missed_deadline_names_the_transfer_and_keeps_the_buffer_until_it_ends(
    loader: GatedLoader, counters: Counters
) -> None:
    stream = ChunkStream(loader, 3, counters, deadline_s=0.01)
    gate = loader.hold(B)
    with pytest.raises(TransferTimeout, match=r"load of chunk 1: not done after 0.01 s"):
        read_all(stream, loader, [A, B], upcoming=[])
    assert (B, False) not in loader.released
    gate.set()
    stream.drain()
    read_all(stream, loader, [A, B, C, D], upcoming=[])


def test_consumer_that_stops_half_way_leaves_every_buffer_usable(
    stream: ChunkStream, loader: GatedLoader
) -> None:
    for _ in range(4):
        reading = stream.read([A, B, C], [])
        next(reading)
        reading.close()
    read_all(stream, loader, [D, E, F], upcoming=[])


def test_drain_waits_for_every_load_and_forgets_it(
    stream: ChunkStream, loader: GatedLoader, executor: ThreadPoolExecutor
) -> None:
    gate = loader.hold(C)
    read_all(stream, loader, [A], upcoming=[B, C])
    draining = executor.submit(stream.drain)
    assert not draining.done()
    gate.set()
    draining.result(WAIT_S)
    assert set(loader.released) == {(A, True), (B, False), (C, False)}


def test_time_spent_waiting_is_counted(
    stream: ChunkStream, loader: GatedLoader, counters: Counters
) -> None:
    read_all(stream, loader, [A], upcoming=[])
    assert counters.load_wait_s > 0
