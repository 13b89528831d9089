"""The simulation: requests of a trace on boxes, event by event. Nothing is left to chance."""

import heapq
import math
import random
from collections.abc import Callable
from typing import Final, Literal, get_args

from offload.bench.sim_engine import SimEngine, SimJob
from offload.bench.sim_machine import Box
from offload.bench.sim_mover import LINKS, Mover, Store
from offload.bench.sim_result import Counts, Outcome, SimResult
from offload.bench.sim_tiers import Link
from offload.bench.sim_trace import Trace
from offload.errors import ConfigError

Routing = Literal["affinity", "random"]

_GOLDEN: Final = 0.6180339887498949


def simulate(
    trace: Trace,
    box: Box,
    num_boxes: int = 1,
    routing: Routing = "affinity",
    seed: int = 0,
    window_s: tuple[float, float] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> SimResult:
    """Replay a trace; the same arguments give the same result.

    A turn is asked when the trace says, but not before its session's last answer has ended.

    Parameters
    ----------
    trace : Trace
    box : Box
        All boxes are alike.
    num_boxes : int
    routing : {"affinity", "random"}
        Every session on one box, or every request on any.
    seed : int
        Of random routing.
    window_s : (float, float), optional
        Count what arrives and is done between these times only, when load is neither rising nor
        falling; by default everything counts. Times between tokens are always those of all.
    progress : callable
        Told after each request how many have ended, and how many there are.

    Raises
    ------
    ConfigError
        There is no box, no request (in the window), no such routing, or a context is larger than
        the device.
    """
    if num_boxes < 1:
        raise ConfigError(f"{num_boxes} boxes; at least 1 is needed")
    if routing not in get_args(Routing):
        raise ConfigError(f"routing {routing!r} is none of {', '.join(get_args(Routing))}")
    if not trace.requests:
        raise ConfigError("the trace has no requests")
    if window_s is not None and not any(
        window_s[0] <= each.arrival_s <= window_s[1] for each in trace.requests
    ):
        raise ConfigError(f"no request arrives between {window_s[0]} and {window_s[1]} s")
    most = max(each.input_tokens + each.output_tokens for each in trace.requests)
    if most * box.token_bytes > box.device_bytes:
        raise ConfigError(
            f"a context of {most} tokens is {most * box.token_bytes} bytes, "
            f"but the device of {box.name} has {box.device_bytes}"
        )
    cluster = _Cluster(trace, box, num_boxes, routing, seed, progress)
    return cluster.run(window_s)


class _Cluster:
    """Boxes, what they share, and what happens when."""

    def __init__(
        self,
        trace: Trace,
        box: Box,
        num_boxes: int,
        routing: Routing,
        seed: int,
        progress: Callable[[int, int], object],
    ) -> None:
        self._trace = trace
        self._kept = trace.kept_ids()
        self._num_boxes = num_boxes
        self._progress = progress
        self._draw = random.Random(seed) if routing == "random" else None
        self._store = Store(box, trace.block_tokens)
        self._movers = [Mover(box, trace.block_tokens, self._store) for _ in range(num_boxes)]
        self._engines = [SimEngine(box, mover, self._at, self._ended) for mover in self._movers]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_events = 0
        self._outcomes: dict[int, Outcome] = {}
        self._num_ended = 0
        self._turns: dict[int, list[int]] = {}
        for index, request in enumerate(trace.requests):
            self._turns.setdefault(request.session, []).append(index)

    def run(self, window_s: tuple[float, float] | None) -> SimResult:
        """Go on until nothing happens any more; return what was counted."""
        counts: list[Counts] = []
        for time_s in window_s or ():
            self._at(time_s, lambda now_s: counts.append(self._count(now_s)))
        for turns in self._turns.values():
            turns.reverse()
            self._ask(turns.pop(), -math.inf)
        while self._events:
            now_s, _, action = heapq.heappop(self._events)
            action(now_s)
        outcomes = [self._outcomes[index] for index in sorted(self._outcomes)]
        if window_s is None:
            begin_s = min(each.arrival_s for each in outcomes)
            window_s = begin_s, max(each.end_s for each in outcomes)
            counts = [Counts(), self._count(window_s[1])]
        begin_s, end_s = window_s
        return SimResult(
            num_boxes=self._num_boxes,
            outcomes=tuple(each for each in outcomes if begin_s <= each.arrival_s <= end_s),
            gaps=tuple(sorted(self._gaps().items())),
            counts=counts[1] - counts[0],
            num_servers={"compute": self._num_boxes}
            | {name: len(links) for name, links in self._links().items()},
            span_s=end_s - begin_s,
        )

    def _links(self) -> dict[str, list[Link]]:
        links = {name: [mover.links[name] for mover in self._movers] for name in LINKS}
        return links | {name: [link] for name, link in self._store.links.items()}

    def _count(self, now_s: float) -> Counts:
        """Add up what every box has done so far."""
        links = self._links()
        work = {"compute": sum(engine.work_s for engine in self._engines)}
        return Counts(
            work
            | {name: sum(each.busy_s(now_s) for each in every) for name, every in links.items()},
            {name: sum(each.num_bytes for each in every) for name, every in links.items()},
            {name: sum(each.num_operations for each in every) for name, every in links.items()},
        )

    def _gaps(self) -> dict[float, int]:
        gaps: dict[float, int] = {}
        for engine in self._engines:
            for gap_s, count in engine.gaps.items():
                gaps[gap_s] = gaps.get(gap_s, 0) + count
        return gaps

    def _at(self, time_s: float, action: Callable[[float], None]) -> None:
        self._num_events += 1  # events at the same time happen in the order they were made
        heapq.heappush(self._events, (time_s, self._num_events, action))

    def _ask(self, index: int, not_before_s: float) -> None:
        """Have a request made when it is due."""
        arrival_s = max(self._trace.requests[index].arrival_s, not_before_s)
        self._at(arrival_s, lambda now_s: self._arrive(index, now_s))

    def _arrive(self, index: int, now_s: float) -> None:
        request = self._trace.requests[index]
        box = self._route(request.session)
        outcome = Outcome(index, box, now_s, {}, request.input_tokens, request.output_tokens)
        self._outcomes[index] = outcome
        self._engines[box].add(SimJob(request, self._kept[index], outcome), now_s)

    def _route(self, session: int) -> int:
        if self._draw is not None:
            return self._draw.randrange(self._num_boxes)
        # Multiples of the golden ratio spread evenly, however sessions are numbered.
        return int(session * _GOLDEN % 1.0 * self._num_boxes)

    def _ended(self, job: SimJob, now_s: float) -> None:
        turns = self._turns[job.request.session]
        if turns:
            self._ask(turns.pop(), now_s)
        self._num_ended += 1
        self._progress(self._num_ended, len(self._trace.requests))
