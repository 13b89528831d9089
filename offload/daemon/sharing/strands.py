"""Jobs on a few threads; those of one key run one after the other, in the order they came."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

R = TypeVar("R")

_LOG = logging.getLogger(__name__)


class Strands:
    """A pool of threads that keeps the order of each key. Any thread may call.

    Parameters
    ----------
    num_threads : int
    name : str
        Of the threads.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, name)
        self._lock = threading.Lock()
        self._waiting: dict[Hashable, deque[tuple[Future[Any], Callable[[], Any]]]] = {}

    def submit(self, key: Hashable, job: Callable[..., R], *args: Any) -> Future[R]:
        """Have a job run after those of the same key; cancelling it before that drops it.

        Raises
        ------
        RuntimeError
            After ``close``.
        """
        future: Future[R] = Future()
        with self._lock:
            is_first = key not in self._waiting
            if is_first:
                self._pool.submit(self._run, key)
            self._waiting.setdefault(key, deque()).append((future, lambda: job(*args)))
        return future

    def post(self, key: Hashable, job: Callable[..., object], *args: Any) -> Future[object]:
        """``submit`` a job whose result nobody looks at: what goes wrong is logged."""
        future = self.submit(key, job, *args)
        future.add_done_callback(_log_error)
        return future

    def close(self) -> None:
        """Take no more jobs, and wait for those that run; drop the others. Idempotent."""
        with self._lock:
            dropped = [future for jobs in self._waiting.values() for future, _ in jobs]
        for future in dropped:
            future.cancel()
        self._pool.shutdown()

    def _run(self, key: Hashable) -> None:
        with self._lock:
            future, job = self._waiting[key][0]
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
        with self._lock:
            self._waiting[key].popleft()
            if not self._waiting[key]:
                del self._waiting[key]
                return
        # Others' keys get their turn. After ``close`` what is left was cancelled.
        try:
            self._pool.submit(self._run, key)
        except RuntimeError:
            with self._lock:
                del self._waiting[key]


def _log_error(future: "Future[Any]") -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        _LOG.error("something that nobody waits for has failed", exc_info=error)
