import errno
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from offload.errors import StorageError, TransferCancelled, TransferTimeout
from offload.tiers.io_engine import IoEngine
from offload.tiers.transfer import CompletedTransfer, FutureTransfer

_WAIT_S = 30.0


def _futures(n: int) -> list[Future[None]]:
    return [Future() for _ in range(n)]


def _finish(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        future.set_result(None)


def test_wait_that_misses_its_deadline_names_the_transfer_and_what_is_left() -> None:
    futures = _futures(3)
    transfer = FutureTransfer("load of chunk 7", 100, futures)
    _finish(futures[:1])
    with pytest.raises(
        TransferTimeout,
        match=r"load of chunk 7: not done after 0\.01 s \(2 of 3 jobs left, 100 bytes in all\)",
    ):
        transfer.wait(0.01)
    assert not transfer.done()
    _finish(futures[1:])
    assert transfer.done()
    transfer.wait(0)


def test_transfer_whose_job_failed_waits_for_the_others_and_raises_the_error() -> None:
    finished: list[str] = []
    futures = _futures(2)
    transfer = FutureTransfer("load", 1, futures, lambda: finished.append("once"))
    futures[0].set_exception(StorageError(errno.EIO, "broken"))
    with pytest.raises(TransferTimeout):
        transfer.wait(0.01)
    assert finished == []
    _finish(futures[1:])
    for _ in range(2):
        with pytest.raises(StorageError, match="broken"):
            transfer.wait(0)
    assert finished == ["once"]


def test_only_job_is_cancelled_before_it_starts() -> None:
    [future] = futures = _futures(1)
    transfer = FutureTransfer("load", 1, futures)
    assert transfer.cancel()
    assert transfer.cancel()
    assert not future.set_running_or_notify_cancel()
    with pytest.raises(TransferCancelled, match="load: cancelled"):
        transfer.wait(0)


def test_started_job_is_not_cancelled_and_ends_well() -> None:
    [future] = futures = _futures(1)
    transfer = FutureTransfer("load", 1, futures)
    future.set_running_or_notify_cancel()
    assert not transfer.cancel()
    _finish(futures)
    assert not transfer.cancel()
    transfer.wait(0)


def test_several_jobs_that_cannot_be_withdrawn_together_are_not_cancelled() -> None:
    futures = _futures(2)
    transfer = FutureTransfer("load", 1, futures)
    assert not transfer.cancel()
    assert not any(future.cancelled() for future in futures)
    _finish(futures)
    transfer.wait(0)


def test_transfer_of_nothing_is_done_and_cannot_be_cancelled() -> None:
    engine = IoEngine(1)
    transfer = FutureTransfer("load of nothing", 0, [], withdraw=engine.withdraw)
    assert transfer.done()
    assert not transfer.cancel()
    transfer.wait(0)
    engine.close()


def test_cancelled_transfer_is_over_although_its_thread_never_comes_across_it() -> None:
    gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(gate.wait, _WAIT_S)
        future: Future[None] = pool.submit(lambda: None)
        transfer = FutureTransfer("load", 1, [future])
        assert transfer.cancel()
        assert transfer.done()
        with pytest.raises(TransferCancelled):
            transfer.wait(0)
        gate.set()


def test_transfer_cancelled_from_another_thread_ends_the_wait_for_it() -> None:
    """Scenario: the disk hangs; one thread waits for a queued read, another gives it up."""
    busy, gate, waiting = threading.Event(), threading.Event(), threading.Event()

    def hang(_: memoryview) -> None:
        busy.set()
        assert gate.wait(_WAIT_S)

    class _Watched(FutureTransfer):
        def wait(self, timeout_s: float | None = None) -> None:
            waiting.set()
            super().wait(timeout_s)

    engine = IoEngine(1)
    engine.submit([hang], urgent=True)
    assert busy.wait(_WAIT_S)
    futures = engine.submit([hang, hang], urgent=True)
    transfer = _Watched("load", 1, futures, withdraw=engine.withdraw)
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(transfer.wait, _WAIT_S)
        assert waiting.wait(_WAIT_S)
        assert transfer.cancel()
        with pytest.raises(TransferCancelled):
            outcome.result(_WAIT_S)
    gate.set()
    engine.close()


def test_completed_transfer_is_done_and_cannot_be_cancelled() -> None:
    transfer = CompletedTransfer(5)
    transfer.wait(0)
    assert transfer.done()
    assert not transfer.cancel()
    assert transfer.num_bytes == 5
