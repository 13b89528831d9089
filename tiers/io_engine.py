"""Execute disk I/O: a small pool of threads that serves reads before writes."""

import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from offload.errors import ClosedError, ConfigError, TransferTimeout
from offload.tiers.io_plan import MAX_OP_BUFFERS
from offload.types import PAGE_BYTES

Job = Callable[[memoryview], None]
"""Work for one thread. Its argument is the thread's own page-aligned scratch memory."""

SCRATCH_PAGES = MAX_OP_BUFFERS // 2
"""Header pages of the largest operation: every record takes a header and a payload buffer."""


class IoEngine:
    """Runs jobs on a few threads, reads before writes, each kind in the order of arrival.

    Invariant: every job accepted by ``submit`` runs exactly once or is cancelled; ``close`` returns
    only when no thread is left. Any thread may call any method.

    Parameters
    ----------
    num_threads : int
    max_queued : int
        Jobs of each kind waiting for a thread, so that reads find room when writes have none; a
        batch that does not fit waits, unless none of its kind is queued.
    deadline_s : float
        Longest wait for room in the queue, and for the jobs that are left at ``close``.
    """

    def __init__(
        self, num_threads: int = 4, *, max_queued: int = 256, deadline_s: float = 60.0
    ) -> None:
        if num_threads < 1:
            raise ConfigError(f"disk I/O needs at least one thread, not {num_threads}")
        self.num_threads = num_threads
        self.max_queued = max_queued
        self.deadline_s = deadline_s
        # One lock, and a condition for each side: a worker must not wake its idle colleagues.
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._urgent: deque[_Task] = deque()
        self._patient: deque[_Task] = deque()
        self._closing = False
        self._threads = [
            # Daemons, because one stuck in a dead disk must not keep the process from ending.
            threading.Thread(target=self._serve, name=f"offload-disk-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, jobs: Sequence[Job], *, urgent: bool, what: str = "disk I/O"
    ) -> list[Future[None]]:
        """Queue a batch of jobs, all or none.

        Parameters
        ----------
        jobs : sequence of callable
        urgent : bool
            Run before everything that is not urgent.
        what : str
            Names the batch in the message of a missed deadline.

        Returns
        -------
        list of Future
            One per job. Cancelling one that has not started keeps it from running; ``withdraw``
            cancels several together.

        Raises
        ------
        ClosedError
        TransferTimeout
            No room in the queue within ``deadline_s``.
        """
        tasks = [_Task(job) for job in jobs]
        queue = self._urgent if urgent else self._patient
        with self._lock:
            if not self._room.wait_for(lambda: self._admits(queue, len(tasks)), self.deadline_s):
                raise TransferTimeout(
                    f"{what}: {len(tasks)} operations found no room for {self.deadline_s} s: "
                    f"{len(queue)} queued, at most {self.max_queued}"
                )
            if self._closing:
                raise ClosedError(f"{what}: the disk I/O engine is closed")
            queue.extend(tasks)
            self._work.notify(len(tasks))
        return [task.future for task in tasks]

    def withdraw(self, futures: Sequence[Future[None]]) -> bool:
        """Cancel jobs, all of them or none.

        Returns
        -------
        bool
            True: none has started, and none will. False: one has, and nothing has changed.
        """
        with self._lock:
            wanted = {future for future in futures if not future.cancelled()}
            queued = {task for task in (*self._urgent, *self._patient) if task.future in wanted}
            if len(queued) < len(wanted):
                return False
            self._drop(queued)
            return True

    def close(self) -> None:
        """Finish what was queued, then stop the threads. Idempotent.

        Raises
        ------
        TransferTimeout
            A job was still running after ``deadline_s``. Its thread was left behind, and what
            was queued behind it is cancelled.
        """
        with self._lock:
            self._closing = True
            self._work.notify_all()
            self._room.notify_all()
        deadline = time.monotonic() + self.deadline_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [thread.name for thread in self._threads if thread.is_alive()]
        if stuck:
            with self._lock:
                self._drop({*self._urgent, *self._patient})
            raise TransferTimeout(
                f"disk I/O still running {self.deadline_s} s after close: {', '.join(stuck)}"
            )

    @property
    def _num_queued(self) -> int:
        return len(self._urgent) + len(self._patient)

    def _admits(self, queue: "deque[_Task]", n: int) -> bool:
        return self._closing or not queue or len(queue) + n <= self.max_queued

    def _drop(self, tasks: "set[_Task]") -> None:
        for queue in (self._urgent, self._patient):
            kept = [task for task in queue if task not in tasks]
            queue.clear()
            queue.extend(kept)
        for task in tasks:
            task.cancel()
        self._room.notify_all()

    def _serve(self) -> None:
        scratch = memoryview(mmap.mmap(-1, SCRATCH_PAGES * PAGE_BYTES))
        while (task := self._next()) is not None:
            task.run(scratch)
            del task  # else the buffers of the last job live until the next one comes

    def _next(self) -> "_Task | None":
        with self._lock:
            self._work.wait_for(lambda: self._num_queued > 0 or self._closing)
            if not self._num_queued:
                return None
            task = (self._urgent or self._patient).popleft()
            self._room.notify_all()
            return task


class _Task:
    """A job and the future that tells how it went."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.future: Future[None] = Future()

    def cancel(self) -> None:
        self.future.cancel()
        # Out of the queue, no thread comes across the job to wake those who wait for it.
        self.future.set_running_or_notify_cancel()

    def run(self, scratch: memoryview) -> None:
        future = self.future
        if not future.set_running_or_notify_cancel():
            return
        try:
            self._job(scratch)
        except BaseException as error:
            future.set_exception(error)
            # The traceback refers to this frame: without this, a cycle keeps the buffers alive.
            del self, future
        else:
            future.set_result(None)
