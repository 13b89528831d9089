"""The same workload on more boxes and under more load, until some part is full."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from offload.bench.scale_model import Prices
from offload.bench.sim_cluster import Routing, simulate
from offload.bench.sim_machine import TIERS, Box
from offload.bench.sim_result import SimResult
from offload.bench.sim_trace import Trace

FULL: Final = 0.95
"""Utilisation from which a part counts as saturated."""


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One simulation of a sweep.

    Attributes
    ----------
    load : float
        How many times as many sessions at once as the trace has.
    """

    num_boxes: int
    load: float
    result: SimResult

    @property
    def turns_per_s(self) -> float:
        """Requests per second and box."""
        return len(self.result.outcomes) / self.result.span_s / self.num_boxes


def sweep(
    trace_of: Callable[[int], Trace],
    box: Box,
    boxes: Sequence[int] = (1,),
    loads: Sequence[float] = (1.0,),
    routing: Routing = "affinity",
    seed: int = 0,
    *,
    is_steady: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[SweepRow]:
    """Simulate every number of boxes under every load.

    Parameters
    ----------
    trace_of : callable
        The trace for so many boxes.
    box : Box
    boxes : sequence of int
    loads : sequence of float
        See ``Trace.denser``.
    routing : {"affinity", "random"}
    seed : int
        Of random routing.
    is_steady : bool
        Count only the second half of the time in which sessions begin, when tiers have filled.
    progress : callable
        Told how many simulations are done, and of how many.

    Raises
    ------
    ConfigError
        As from ``simulate``; a load is not positive.
    """
    rows: list[SweepRow] = []
    for num_boxes in boxes:
        trace = trace_of(num_boxes)
        for load in loads:
            denser = trace.denser(load)
            window_s = steady_window_s(denser) if is_steady else None
            result = simulate(denser, box, num_boxes, routing, seed, window_s)
            rows.append(SweepRow(num_boxes, load, result))
            progress(len(rows), len(boxes) * len(loads))
    return rows


def steady_window_s(trace: Trace) -> tuple[float, float]:
    """Return the second half of the time in which sessions begin."""
    begins: dict[int, float] = {}
    for each in trace.requests:
        begins.setdefault(each.session, each.arrival_s)
    last_s = max(begins.values())
    return last_s / 2, last_s


def first_saturated(rows: Sequence[SweepRow]) -> SweepRow | None:
    """Return the first row in which a part is full; None if there is none."""
    return next((row for row in rows if row.result.utilisation[row.result.busiest] >= FULL), None)


def cost_table(box: Box, prices: Prices, prompt_tokens: float) -> list[dict[str, Any]]:
    """Return, for each tier, what a million cached tokens cost, and when that pays.

    Returns
    -------
    list of dict
        ``tier``; ``usd_per_month``; ``break_even_s``, for how long they are kept for what computing
        them again in prompts of ``prompt_tokens`` costs; ``tokens``, how many fit.
    """
    return [
        {
            "tier": tier,
            "usd_per_month": prices.kept_usd(box.token_bytes, tier),
            "break_even_s": prices.break_even_s(box, tier, prompt_tokens),
            "tokens": box.capacity_bytes(tier) // box.token_bytes,
        }
        for tier in TIERS
    ]


def row_json(row: SweepRow, prices: Prices) -> dict[str, Any]:
    """Return a row's figures, and what they cost."""
    result = row.result
    spent = row.num_boxes * result.span_s / 3600 * prices.box_usd_per_hour
    hits = sum(sum(each.hits.values()) for each in result.outcomes)
    outputs = sum(each.output_tokens for each in result.outcomes)
    return {
        "load": row.load,
        "turns_per_s_and_box": row.turns_per_s,
        **result.to_json(),
        "usd_per_million_output_tokens": 1e6 * spent / outputs,
        "usd_per_million_hit_tokens": 1e6 * spent / hits if hits else None,
        "prices": asdict(prices),
    }
