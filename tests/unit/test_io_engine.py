import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from offload.errors import (
    ClosedError,
    ConfigError,
    CorruptChunk,
    DiskFull,
    StorageError,
    TransferTimeout,
)
from offload.tiers.io_engine import (
    SCRATCH_PAGES,
    IoEngine,
    VectoredCall,
    read_fully,
    supports_direct_io,
    write_fully,
)
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


def test_batch_that_finds_no_room_in_time_is_refused_whole() -> None:
    log: list[str] = []
    with _busy_engine(max_queued=2, deadline_s=0.05) as (engine, _):
        engine.submit([_note(log, "queued")], urgent=False)
        with pytest.raises(TransferTimeout, match=r"2 disk operations .* 1 queued, at most 2"):
            engine.submit([_note(log, "refused")] * 2, urgent=True)
    assert log == ["queued"]


def test_batch_waits_for_room_and_then_runs() -> None:
    log: list[str] = []
    with _busy_engine(max_queued=1) as (engine, gate):
        engine.submit([_note(log, "first")], urgent=False)
        threading.Timer(0.01, gate.go.set).start()
        [future] = engine.submit([_note(log, "second")], urgent=False)
        future.result(_WAIT_S)
    assert log == ["first", "second"]


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


def test_close_with_a_job_that_hangs_names_the_thread_after_the_deadline() -> None:
    with (
        _busy_engine(deadline_s=0.05) as (engine, _),
        pytest.raises(TransferTimeout, match=r"running 0\.05 s after close: offload-disk-0"),
    ):
        engine.close()


def test_engine_without_threads_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one thread, not 0"):
        IoEngine(0)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def _buffers(*sizes: int, fill: bytes = b"\0") -> list[memoryview]:
    return [memoryview(bytearray(fill * size)) for size in sizes]


def _pattern(num_bytes: int) -> bytes:
    return bytes(i % 251 for i in range(num_bytes))


def _at_most(call: VectoredCall, limit: int) -> VectoredCall:
    """Make a call that moves at most ``limit`` bytes, as the system is free to do."""

    def limited(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        room, part = limit, []
        for buffer in buffers:
            part.append(buffer[:room])
            room -= len(part[-1])
        return call(fd, part, offset)

    return limited


def _interrupted(call: VectoredCall) -> VectoredCall:
    """Make a call that is interrupted every other time."""
    calls = iter(range(1000))

    def flaky(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if next(calls) % 2 == 0:
            raise InterruptedError
        return call(fd, buffers, offset)

    return flaky


def _failing(code: int) -> VectoredCall:
    def fail(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("limit", [1000, PAGE_BYTES, PAGE_BYTES + 1, 3 * PAGE_BYTES - 1])
def test_short_writes_and_reads_are_continued(fd: int, limit: int) -> None:
    content = _pattern(7 * PAGE_BYTES)
    source = [memoryview(content)[:PAGE_BYTES], memoryview(content)[PAGE_BYTES:]]
    write_fully(fd, source, PAGE_BYTES, "write", _at_most(os.pwritev, limit))
    out = _buffers(3 * PAGE_BYTES, PAGE_BYTES, 3 * PAGE_BYTES)
    read_fully(fd, out, PAGE_BYTES, "read", _at_most(os.preadv, limit))
    assert b"".join(out) == content


def test_interrupted_calls_are_repeated(fd: int) -> None:
    write_fully(fd, _buffers(10, fill=b"x"), 0, "write", _interrupted(os.pwritev))
    out = _buffers(10)
    read_fully(fd, out, 0, "read", _interrupted(os.preadv))
    assert bytes(out[0]) == b"x" * 10


@pytest.mark.parametrize("present", [0, 100, PAGE_BYTES, PAGE_BYTES + 100])
def test_read_beyond_the_end_of_the_file_says_how_much_is_missing(fd: int, present: int) -> None:
    os.pwrite(fd, b"x" * present, 0)
    with pytest.raises(CorruptChunk, match=f"ends {2 * PAGE_BYTES - present} bytes too early"):
        read_fully(fd, _buffers(2 * PAGE_BYTES), 0, "read")


def test_write_that_stops_moving_bytes_is_an_error(fd: int) -> None:
    with pytest.raises(StorageError, match="stopped 10 bytes short"):
        write_fully(fd, _buffers(10), 0, "write", lambda *_: 0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_quota_or_file_size_left_is_disk_full(fd: int, code: int) -> None:
    with pytest.raises(DiskFull, match="record 7") as caught:
        write_fully(fd, _buffers(10), 0, "record 7", _failing(code))
    assert caught.value.errno == code


def test_other_errors_are_storage_errors_with_their_number(fd: int) -> None:
    with pytest.raises(StorageError, match="record 7") as caught:
        read_fully(fd, _buffers(10), 0, "record 7", _failing(errno.EIO))
    assert caught.value.errno == errno.EIO
    assert not isinstance(caught.value, DiskFull | CorruptChunk)


def test_probe_for_direct_io_leaves_nothing_behind(tmp_path: Path) -> None:
    supports_direct_io(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_system_that_refuses_direct_io_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "pwritev", _failing(code))
    assert not supports_direct_io(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_probe_in_a_missing_directory_is_refused_with_path_and_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot write in {tmp_path}/none: No such file"):
        supports_direct_io(tmp_path / "none")
