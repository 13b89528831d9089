"""A simulated box's engine: a piece of one prompt, then a token of every answer, and again."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from offload.bench.sim_machine import Box
from offload.bench.sim_mover import Mover
from offload.bench.sim_result import Outcome
from offload.bench.sim_trace import TraceRequest

At = Callable[[float, Callable[[float], None]], None]
"""Has something called at a time, with that time."""

_MOST_STEPS = 256
"""Of answers alone, taken at once; an arrival cuts them short."""


@dataclass(eq=False, slots=True)
class SimJob:
    """A request under way: ``missing`` tokens are computed before the next one is chosen."""

    request: TraceRequest
    kept_ids: tuple[int, ...]
    outcome: Outcome
    context: int = 0
    missing: int = 0
    remaining: int = 0
    on_host: set[int] = field(default_factory=set)

    @property
    def is_reading(self) -> bool:
        """Whether it is to be prefilled; a single token is decoded beside the others."""
        return self.missing > 1 or (self.missing == 1 and not self.context)

    @property
    def most_tokens(self) -> int:
        """Its context at its end."""
        return self.request.input_tokens + self.request.output_tokens


@dataclass(slots=True)
class _Steps:
    """Tokens of all answers, one after the other."""

    begin_s: float
    jobs: list[SimJob]
    context: int
    count: int


class SimEngine:
    """What one box does.

    Parameters
    ----------
    box : Box
    mover : Mover
    at : callable
    on_end : callable
        Told of every job that has ended, and when.

    Attributes
    ----------
    work_s : float
        Computed so far, in the time that it takes where the batch is full: a step costs as much
        for one answer as for many, so a processor that is never idle may still have room.
    gaps : dict of float to int
        Seconds between two tokens of an answer, and how often.
    """

    def __init__(
        self, box: Box, mover: Mover, at: At, on_end: Callable[[SimJob, float], None]
    ) -> None:
        self.work_s = 0.0
        self.gaps: dict[float, int] = {}
        self._box = box
        self._mover = mover
        self._at = at
        self._on_end = on_end
        self._waiting: deque[SimJob] = deque()
        self._loading: list[SimJob] = []
        self._running: list[SimJob] = []
        self._steps: _Steps | None = None
        self._is_busy = False
        self._version = 0
        self._token_s = 0.0

    def add(self, job: SimJob, now_s: float) -> None:
        """Take a request."""
        self._waiting.append(job)
        self._wake(now_s)

    def _wake(self, now_s: float) -> None:
        if not self._is_busy:
            self._begin(now_s, now_s)
        elif self._steps is not None and self._steps.count > 1:
            self._cut_short(self._steps, now_s)

    def _begin(self, now_s: float, since_s: float) -> None:
        """Begin a round, if there is anything to do; the last one's tokens came at ``since_s``."""
        end_s = self._admit(now_s)
        reading = next((job for job in self._running if job.is_reading), None)
        had = [job for job in self._running if not math.isnan(job.outcome.first_s)]
        if reading is not None:
            end_s = self._read_piece(reading, end_s)
        answering = [job for job in self._running if not job.is_reading and job.remaining]
        self._is_busy = bool(self._running)
        if not self._is_busy:
            return
        count = 0
        if answering:
            count = 1 if reading else min(_MOST_STEPS, *(job.remaining for job in answering))
        context = sum(job.context + 1 for job in answering)
        self._steps = _Steps(end_s, answering, context, count)
        step_s = self._elapsed_s(self._steps, min(count, 1))
        self._note_gap(end_s - since_s + step_s, len(had))
        # Of a prompt that has just ended, the first token came before this step.
        begun = sum(not math.isnan(job.outcome.first_s) for job in answering)
        self._note_gap(step_s, begun - len(had))
        self._end_at(end_s + self._elapsed_s(self._steps, count))

    def _admit(self, now_s: float) -> float:
        """Take in who waits, while there is room; return when that is done."""
        box, end_s = self._box, now_s
        while self._waiting and self._has_room(self._waiting[0]):
            job = self._waiting.popleft()
            request = job.request
            found = self._mover.find(request.block_ids, request.input_tokens, now_s)
            job.outcome.hits = self._mover.tokens(found, request.input_tokens)
            job.context = sum(job.outcome.hits.values())
            job.missing = request.input_tokens - job.context
            job.remaining = request.output_tokens
            self.work_s += box.request_s
            end_s += box.request_s
            ready_s = self._mover.load(found, end_s)
            job.on_host = self._mover.use(request.block_ids, found, now_s)
            if box.is_blocking or ready_s <= end_s:
                end_s = max(end_s, ready_s)
                self._running.append(job)
            else:
                self._loading.append(job)
                self._at(ready_s, lambda now_s, job=job: self._loaded(job, now_s))  # type: ignore[misc]
        return end_s

    def _has_room(self, job: SimJob) -> bool:
        taken = [*self._running, *self._loading]
        if not taken:
            return True
        tokens = sum(each.most_tokens for each in (*taken, job))
        is_small = tokens * self._box.token_bytes <= self._box.device_bytes
        return is_small and len(taken) < self._box.max_running

    def _loaded(self, job: SimJob, now_s: float) -> None:
        self._loading.remove(job)
        self._running.append(job)
        self._wake(now_s)

    def _read_piece(self, job: SimJob, now_s: float) -> float:
        """Compute a piece of a prompt; return when that is done."""
        box, size = self._box, self._box.piece_tokens
        is_alone = all(each.is_reading for each in self._running)
        if not is_alone and self._token_s:
            size = min(size, int(box.max_piece_s / self._token_s))
        size = min(max(size, box.min_piece_tokens), job.missing)
        took_s = box.piece_s(size, job.context)
        self.work_s += took_s
        end_s = now_s + took_s
        last_s = took_s / size
        self._token_s = (self._token_s + last_s) / 2 if self._token_s else last_s
        job.context += size
        job.missing -= size
        self._running.remove(job)
        self._running.append(job)  # the next piece is another's
        if not job.missing:
            job.outcome.first_s = end_s
            job.remaining -= 1
            job.missing = 1
        return end_s

    def _elapsed_s(self, steps: _Steps, count: int) -> float:
        rows = len(steps.jobs)
        return count * self._box.step_s(rows, steps.context + rows * (count - 1) / 2)

    def _full_s(self, steps: _Steps) -> float:
        """Return the share of a step that it would be if there were as many answers as can be."""
        box, rows = self._box, len(steps.jobs)
        in_memory = steps.context * box.token_bytes / box.device_bytes
        share = min(1.0, max(rows / box.max_running, in_memory))
        alone_s = box.step_s(rows, steps.context) - box.decode_s
        return share * box.decode_s + alone_s

    def _note_gap(self, gap_s: float, count: int) -> None:
        if count:
            self.gaps[gap_s] = self.gaps.get(gap_s, 0) + count

    def _end_at(self, end_s: float) -> None:
        self._version += 1
        version = self._version
        self._at(end_s, lambda now_s: self._end(version, now_s))

    def _cut_short(self, steps: _Steps, now_s: float) -> None:
        """End after the step that is being computed."""
        mean_s = self._elapsed_s(steps, steps.count) / steps.count
        count = max(1, min(steps.count, math.floor((now_s - steps.begin_s) / mean_s)))
        while count < steps.count and steps.begin_s + self._elapsed_s(steps, count) < now_s:
            count += 1
        if count < steps.count:
            steps.count = count
            self._end_at(steps.begin_s + self._elapsed_s(steps, count))

    def _end(self, version: int, now_s: float) -> None:
        """End a round, unless it has ended sooner."""
        if version != self._version:
            return
        steps = self._steps
        assert steps is not None
        if steps.count:
            self._apply(steps)
        self._steps = None
        since_s = now_s
        for job in [job for job in self._running if not job.remaining]:
            now_s = self._finish(job, now_s)
        self._begin(now_s, since_s)

    def _apply(self, steps: _Steps) -> None:
        first_s, took_s = (self._elapsed_s(steps, count) for count in (1, steps.count))
        self.work_s += self._full_s(steps) * steps.count
        rest = steps.count - 1
        if rest:
            self._note_gap((took_s - first_s) / rest, rest * len(steps.jobs))
        for job in steps.jobs:
            if math.isnan(job.outcome.first_s):
                job.outcome.first_s = steps.begin_s + first_s
            job.context += steps.count
            job.remaining -= steps.count

    def _finish(self, job: SimJob, now_s: float) -> float:
        """Let a job go, and write what it leaves; return when computing can go on."""
        self._running.remove(job)
        saved_s, count = self._mover.save(job.kept_ids, job.on_host, now_s)
        job.outcome.end_s = now_s
        if self._box.is_blocking and count:
            now_s = saved_s + self._box.write_s
        self._on_end(job, now_s)
        return now_s
