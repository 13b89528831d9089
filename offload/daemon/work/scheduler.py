"""Who is computed when: a piece of one prompt, then one token of every answer, and again."""

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from offload.daemon.requests import Finished, FinishReason, GenerationRequest
from offload.daemon.work.admission import Admission
from offload.daemon.work.compute import Compute
from offload.daemon.work.job import Job
from offload.daemon.work.placing import Placing
from offload.daemon.work.pressure import Pressure
from offload.daemon.work.step_cache import RowFailed, can_share
from offload.daemon.work.tally import Tally, add
from offload.errors import CapacityError, CorruptChunk, OffloadError

if TYPE_CHECKING:
    from collections.abc import Callable

_LOG = logging.getLogger(__name__)

_MOST_FAILURES = 8
"""Times that a request may lose what it has before it fails."""

_MOST_BACKLOG = 4096
"""Events that a client has not taken, after which its answer waits."""


class Scheduler:
    """The requests that wait and run. Used by the engine's thread.

    Parameters
    ----------
    admission : Admission
    placing : Placing
    compute : Compute
    pressure : Pressure
    tally : Tally
    max_running : int
    queue_timeout_s : float
    """

    def __init__(
        self,
        admission: Admission,
        placing: Placing,
        compute: Compute,
        pressure: Pressure,
        tally: Tally,
        max_running: int,
        queue_timeout_s: float,
    ) -> None:
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.observers: list[Callable[[Finished, GenerationRequest], object]] = []
        self._admission = admission
        self._placing = placing
        self._compute = compute
        self._pressure = pressure
        self._tally = tally
        self._max_running = max_running
        self._queue_timeout_s = queue_timeout_s
        self._is_crowded = False  # Somebody had to make room, and nobody has ended since.

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return not self.running and not self.waiting

    @property
    def num_prefilling(self) -> int:
        """Requests that read their prompt."""
        return sum(map(_needs_prefill, self.running))

    def add(self, job: Job) -> None:
        """Have a request wait for its turn."""
        self._tally.requests += 1
        self.waiting.append(job)

    def round(self) -> bool:
        """Admit who can be, and compute one piece and one token each; return whether it did."""
        self._admit()
        is_working = self._prefill()
        return self._decode() or is_working

    def leave(self, job: Job, *, is_discarded: bool) -> None:
        """End a request whose client has gone, keeping what was computed or not."""
        if job in self.running or job in self.waiting:
            job.is_left = True
            self._tally.cancelled += 1
            self._finish(job, "cancelled", is_kept=not is_discarded)

    def stop_all(self) -> None:
        """End every request with what it has."""
        for job in [*self.running, *self.waiting]:
            self._finish(job, "cancelled")

    def _admit(self) -> None:
        now = time.monotonic()
        has_room = not self._is_crowded or not self.running
        for job in list(self.waiting):
            waited = now - job.submitted_s
            if waited > self._queue_timeout_s and job.started_s is None:
                self._fail(job, self._admission.too_late(waited))
                continue
            is_free = len(self.running) < self._max_running and not self._placing.must_wait(job)
            if has_room and is_free:
                has_room = self._place(job)

    def _place(self, job: Job) -> bool:
        """Give a request its keys and values; return False if others have to end first."""
        while True:
            try:
                self._placing.place(job)
            except CapacityError as error:
                if self._pressure.relieve():
                    continue
                if self.running:
                    return False
                self._fail(job, error)
                return True
            except Exception as error:
                _report(error)
                self._fail(job, error)
                return True
            self.waiting.remove(job)
            self.running.append(job)
            return True

    def _prefill(self) -> bool:
        """Compute a piece of the prompt whose turn it is."""
        reading = [job for job in self.running if _needs_prefill(job)]
        if not reading:
            return False
        job = reading[0]
        try:
            self._compute.prefill(job, is_alone=len(reading) == len(self.running))
        except Exception as error:
            self._recover(job, error)
            return True
        self.running.remove(job)
        self.running.append(job)  # the next piece is another's
        self._end_if_done(job)
        return True

    def _decode(self) -> bool:
        jobs = [
            job
            for job in self.running
            if not _needs_prefill(job) and job.mailbox.backlog < _MOST_BACKLOG
        ]
        if not jobs:
            return False
        assert jobs[0].branch is not None
        steps = [jobs] if can_share(jobs[0].branch.cache) else [[job] for job in jobs]
        for step in steps:
            try:
                self._compute.decode(step)
            except RowFailed as failure:
                self._recover(step[failure.row], failure.__cause__ or failure)
            except Exception as error:
                for job in step:
                    self._recover(job, error)
            else:
                for job in step:
                    self._end_if_done(job)
        return True

    def _end_if_done(self, job: Job) -> None:
        if job.answer.reason is not None and (job.num_missing == 0 or job.answer.num_tokens):
            self._finish(job, job.answer.reason)

    def _recover(self, job: Job, error: BaseException) -> None:
        """Do what lets a request go on after an error, or end it.

        Its branch is as it was before the step that failed.
        """
        if isinstance(error, CapacityError):
            if self._pressure.relieve() or self._preempt():
                return
        elif isinstance(error, CorruptChunk) and job.num_failures < _MOST_FAILURES:
            job.num_failures += 1
            self._placing.give_up(job)
            self._requeue(job)
            return
        else:
            _report(error)
        self._fail(job, error if isinstance(error, Exception) else RuntimeError(str(error)))

    def _preempt(self) -> bool:
        """Make the request that came last wait again, so that others have room."""
        if len(self.running) < 2:
            return False
        job = max(self.running, key=lambda each: each.submitted_s)
        self._is_crowded = True
        self._tally.preemptions += 1
        self._placing.put_aside(job)
        self._requeue(job)
        return True

    def _requeue(self, job: Job) -> None:
        self.running.remove(job)
        self.waiting.appendleft(job)

    def _finish(self, job: Job, reason: FinishReason, *, is_kept: bool = True) -> None:
        event = job.finished(reason, job.answer.finish())
        self._remove(job)
        self._placing.release(job, is_kept=is_kept)
        self._admission.release(job.request, event.prefill_s + event.decode_s)
        self._tally.prompt_tokens += event.num_prompt_tokens
        self._tally.cached = add(self._tally.cached, event.cached)
        if job.started is not None:
            job.mailbox.put(job.started)
        for observer in self.observers:
            observer(event, job.request)
        job.mailbox.put(event)

    def _fail(self, job: Job, error: Exception) -> None:
        self._remove(job)
        self._placing.release(job, is_kept=job.branch is not None and job.branch.is_sound)
        self._admission.release(job.request)
        self._tally.failed += 1
        job.mailbox.put(error)

    def _remove(self, job: Job) -> None:
        if job in self.running:
            self.running.remove(job)
            self._is_crowded = False
        else:
            self.waiting.remove(job)


def _needs_prefill(job: Job) -> bool:
    """Whether more than one token is missing, or what one token leaves is wanted in full."""
    wants_all = job.request.sampling.prompt_logprobs and not job.answer.num_tokens
    is_empty = job.branch is not None and not len(job.branch.tokens)
    return job.num_missing > 1 or wants_all or is_empty


def _report(error: BaseException) -> None:
    """Log what is not a refusal of ours, with where it came from."""
    if not isinstance(error, OffloadError):
        _LOG.error("a request has failed", exc_info=error)
