import contextlib
import ctypes
import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from typing import Any

import pytest

from offload.errors import ClosedError, ConfigError, StorageError, TransferTimeout
from offload.tiers.io_engine import SCRATCH_PAGES, IoEngine
from offload.types import PAGE_BYTES

_WAIT_S = 30.0


class _Gate:
    """A job that says when it has started, and ends when it is told to."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.go = threading.Event()

    def __call__(self, scratch: memoryview) -> None:
        self.started.set()
        assert self.go.wait(_WAIT_S)


@contextlib.contextmanager
def _busy_engine(**options: float) -> Iterator[tuple[IoEngine, _Gate]]:
    """An engine whose only thread is held by a gate."""
    engine, gate = IoEngine(1, **options), _Gate()  # type: ignore[arg-type]
    engine.submit([gate], urgent=False)
    assert gate.started.wait(_WAIT_S)
    try:
        yield engine, gate
    finally:
        gate.go.set()
        engine.deadline_s = _WAIT_S
        engine.close()


def _seen_waiting(engine: IoEngine) -> threading.Event:
    """Return an event that is set when a batch finds no room."""
    admits, full = engine._admits, threading.Event()

    def watch(*args: Any) -> bool:
        has_room = admits(*args)
        if not has_room:
            full.set()
        return has_room

    engine._admits = watch  # type: ignore[method-assign, assignment]
    return full


def _note(log: list[str], name: str) -> Callable[[memoryview], None]:
    return lambda _: log.append(name)


def test_reads_run_before_writes_and_each_in_order_of_arrival() -> None:
    log: list[str] = []
    with _busy_engine() as (engine, gate):
        engine.submit([_note(log, "write 1"), _note(log, "write 2")], urgent=False)
        engine.submit([_note(log, "read 1")], urgent=True)
        futures = engine.submit([_note(log, "read 2")], urgent=True)
        gate.go.set()
        futures[0].result(_WAIT_S)
    assert log == ["read 1", "read 2", "write 1", "write 2"]


def test_jobs_run_side_by_side_on_all_threads() -> None:
    engine, gates = IoEngine(3), [_Gate() for _ in range(3)]
    engine.submit(gates, urgent=True)
    assert all(gate.started.wait(_WAIT_S) for gate in gates)
    for gate in gates:
        gate.go.set()
    engine.close()


def test_scratch_memory_is_page_aligned_and_of_one_thread() -> None:
    seen: dict[str, tuple[int, int]] = {}

    def look(scratch: memoryview) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(scratch))
        seen[threading.current_thread().name] = (address % PAGE_BYTES, len(scratch))
        barrier.wait(_WAIT_S)

    barrier = threading.Barrier(2)
    engine = IoEngine(2)
    for future in engine.submit([look, look], urgent=True):
        future.result(_WAIT_S)
    engine.close()
    assert list(seen.values()) == [(0, SCRATCH_PAGES * PAGE_BYTES)] * 2


def test_error_of_a_job_reaches_its_future_and_the_thread_goes_on() -> None:
    def fail(_: memoryview) -> None:
        raise StorageError(errno.EIO, "broken")

    log: list[str] = []
    engine = IoEngine(1)
    failed, fine = engine.submit([fail, _note(log, "next")], urgent=True)
    with pytest.raises(StorageError, match="broken"):
        failed.result(_WAIT_S)
    fine.result(_WAIT_S)
    engine.close()
    assert log == ["next"]


def test_job_cancelled_before_it_started_never_runs() -> None:
    log: list[str] = []
    with _busy_engine() as (engine, gate):
        [future] = engine.submit([_note(log, "cancelled")], urgent=False)
        assert future.cancel()
        gate.go.set()
        with pytest.raises(CancelledError):
            future.result(_WAIT_S)
    assert log == []


def test_batch_that_finds_no_room_in_time_is_refused_whole_and_by_name() -> None:
    log: list[str] = []
    with _busy_engine(max_queued=2, deadline_s=0.05) as (engine, _):
        engine.submit([_note(log, "queued")], urgent=False)
        with pytest.raises(
            TransferTimeout, match=r"store of 2: 2 operations .* for 0\.05 s: 1 queued, at most 2"
        ):
            engine.submit([_note(log, "refused")] * 2, urgent=False, what="store of 2")
    assert log == ["queued"]


def test_reads_find_room_when_writes_have_none() -> None:
    log: list[str] = []
    with _busy_engine(max_queued=1, deadline_s=0.05) as (engine, gate):
        engine.submit([_note(log, "write")], urgent=False)
        with pytest.raises(TransferTimeout):
            engine.submit([_note(log, "write")], urgent=False)
        [future] = engine.submit([_note(log, "read")], urgent=True)
        gate.go.set()
        future.result(_WAIT_S)
    assert log == ["read", "write"]


@pytest.mark.parametrize("event", ["thread_free", "withdrawn", "closed"])
def test_batch_waits_for_room_until_there_is_some_or_the_engine_closes(event: str) -> None:
    log: list[str] = []
    with _busy_engine(max_queued=1) as (engine, gate), ThreadPoolExecutor(2) as pool:
        first = engine.submit([_note(log, "first")], urgent=False)
        full = _seen_waiting(engine)
        second = pool.submit(engine.submit, [_note(log, "second")], urgent=False)
        assert full.wait(_WAIT_S)
        assert not second.done()
        if event == "thread_free":
            gate.go.set()
            second.result(_WAIT_S)[0].result(_WAIT_S)
        elif event == "withdrawn":
            assert engine.withdraw(first)
            assert not second.result(_WAIT_S)[0].done()
        else:
            closing = pool.submit(engine.close)
            with pytest.raises(ClosedError):
                second.result(_WAIT_S)
            gate.go.set()
            closing.result(_WAIT_S)
    expected = {"thread_free": "first second", "withdrawn": "second", "closed": "first"}
    assert " ".join(log) == expected[event]


def test_batch_larger_than_the_queue_is_taken_when_the_queue_is_empty() -> None:
    log: list[str] = []
    with _busy_engine(max_queued=1, deadline_s=0.05) as (engine, _):
        engine.submit([_note(log, "job")] * 5, urgent=False)
    assert log == ["job"] * 5


def test_close_finishes_queued_jobs_and_leaves_no_thread() -> None:
    log: list[str] = []
    before = set(threading.enumerate())
    with _busy_engine() as (engine, _):
        [future] = engine.submit([_note(log, "queued")], urgent=False)
    assert future.done()
    assert log == ["queued"]
    assert set(threading.enumerate()) == before
    engine.close()
    with pytest.raises(ClosedError):
        engine.submit([], urgent=True)


def test_close_with_a_job_that_hangs_names_the_thread_and_cancels_what_waits() -> None:
    log: list[str] = []
    with _busy_engine(deadline_s=0.05) as (engine, _):
        futures = engine.submit([_note(log, "read")], urgent=True)
        futures += engine.submit([_note(log, "write")], urgent=False)
        with pytest.raises(TransferTimeout, match=r"running 0\.05 s after close: offload-disk-0"):
            engine.close()
        assert not wait(futures, _WAIT_S).not_done
        assert all(future.cancelled() for future in futures)
    assert log == []


def test_withdrawn_jobs_never_run_and_wake_who_waits_for_them() -> None:
    log: list[str] = []
    with _busy_engine() as (engine, gate):
        kept = engine.submit([_note(log, "kept")], urgent=False)
        futures = engine.submit([_note(log, "one"), _note(log, "two")], urgent=False)
        assert engine.withdraw(futures)
        assert engine.withdraw(futures)
        assert not wait(futures, _WAIT_S).not_done
        gate.go.set()
        kept[0].result(_WAIT_S)
    assert log == ["kept"]
    assert all(future.cancelled() for future in futures)


@pytest.mark.parametrize("urgent", [True, False], ids=["read", "write"])
def test_jobs_of_which_one_has_started_are_not_withdrawn(urgent: bool) -> None:
    log: list[str] = []
    engine, gate = IoEngine(1), _Gate()
    futures = engine.submit([gate, _note(log, "second")], urgent=urgent)
    assert gate.started.wait(_WAIT_S)
    assert not engine.withdraw(futures)
    gate.go.set()
    engine.close()
    assert not engine.withdraw(futures)
    assert log == ["second"]


def test_jobs_withdrawn_while_a_thread_takes_the_first_all_run() -> None:
    """The thread has taken the job out of the queue, and its future does not say so yet."""
    log: list[str] = []
    hold = _Gate()
    with _busy_engine() as (engine, gate):
        futures = engine.submit([_note(log, "one"), _note(log, "two")], urgent=False)
        begin = futures[0].set_running_or_notify_cancel

        def hesitate() -> bool:
            hold(memoryview(b""))
            return begin()

        futures[0].set_running_or_notify_cancel = hesitate  # type: ignore[method-assign]
        gate.go.set()
        assert hold.started.wait(_WAIT_S)
        assert not engine.withdraw(futures)
        hold.go.set()
    assert log == ["one", "two"]


def test_withdrawing_jobs_that_many_threads_take_moves_all_or_nothing() -> None:
    engine = IoEngine(4)
    for _ in range(200):
        log: list[str] = []
        futures = engine.submit([_note(log, "job")] * 6, urgent=True)
        is_withdrawn = engine.withdraw(futures)
        wait(futures, _WAIT_S)
        assert len(log) == (0 if is_withdrawn else 6)
        assert {future.cancelled() for future in futures} == {is_withdrawn}
    engine.close()


def test_engine_without_threads_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one thread, not 0"):
        IoEngine(0)
