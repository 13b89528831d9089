"""Does the simulator say what the daemon's engine does? One trace, replayed by both.

    python -m benchmarks.simulate [--sessions 20] [--rounds 3] [--faster 1 4] [--json FILE]

The simulator gets rates that are measured apart from the replay, before and after each: prompts
alone, answers alone, saves and restores of idle sessions.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from offload.bench.provenance import read_provenance
from offload.bench.sim_ask import Clock, Heard, ask, engine_clock
from offload.bench.sim_cluster import simulate
from offload.bench.sim_fit import CAPACITY, fit_box
from offload.bench.sim_machine import Box
from offload.bench.sim_measure import measure_timings
from offload.bench.sim_result import SimResult
from offload.bench.sim_trace import Trace, TraceRequest
from offload.bench.sim_workload import Workload, synthesize
from offload.cli_progress import count_progress
from offload.daemon.engine import DaemonEngine
from offload.daemon.engine_settings import EngineSettings, SessionSettings
from offload.daemon.served_model import ServedModel, load_served_model

_BLOCK_TOKENS: Final = 16
_IDLE_S: Final = (2.5, 5.0)
"""After which a session leaves the device, and memory."""

_TICK_S: Final = 0.25
"""The engine looks for such sessions twice a second: so much later on average."""

_BAR: Final = 0.15


@dataclass(frozen=True, slots=True)
class Figures:
    """What both are compared by."""

    total_s: float
    output_tokens_per_s: float
    hit_tokens_memory: float
    hit_tokens_device: float
    hit_tokens_host: float
    hit_tokens_disk: float
    hit_tokens: float
    ttft_median_s: float
    ttft_mean_s: float
    tbt_mean_s: float


@dataclass(frozen=True, slots=True)
class _Round:
    """One replay, and what the simulator says with the rates of the minute before and after."""

    faster: float
    load_average: float
    measured: Figures
    simulated: Figures
    box: Box


def main(arguments: Sequence[str] | None = None) -> None:
    """Replay, simulate, and say how far apart they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--faster", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7)
    text = "time the engine's thread instead of the wall; for replays in which it never rests"
    parser.add_argument("--cpu-time", action="store_true", help=text)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    trace = synthesize(_workload(options.sessions), options.seed, _BLOCK_TOKENS)
    rounds = list[_Round]()
    with tempfile.TemporaryDirectory() as name, count_progress("simulate", "replays") as tell:
        total = options.rounds * len(options.faster)
        model, folder = load_served_model(), Path(name)
        before = measure_timings(model, folder, is_cpu_time=options.cpu_time)
        for number in range(total):
            speed = options.faster[number % len(options.faster)]
            replayed = trace.faster(speed)
            measured = _measure(model, replayed, folder, is_cpu_time=options.cpu_time)
            load = os.getloadavg()[0]
            after = measure_timings(model, folder, is_cpu_time=options.cpu_time)
            box = _as_configured(fit_box([before, after]))
            simulated = _simulated(simulate(replayed, box))
            rounds.append(_Round(speed, load, measured, simulated, box))
            before = after
            tell(number + 1, total)
    rows = [_compare([each for each in rounds if each.faster == f]) for f in options.faster]
    for row in rows:
        _show(row)
    if options.json is not None:
        found = {
            **asdict(read_provenance()),
            "requests": len(trace.requests),
            "rows": rows,
            "rounds": [asdict(each) for each in rounds],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _workload(sessions: int) -> Workload:
    return Workload(
        sessions=sessions,
        sessions_per_s=0.4,
        turns=6.0,
        think_s=6.0,
        first_tokens=1200.0,
        more_tokens=120.0,
        output_tokens=60.0,
        system_prompts=2,
        system_tokens=512,
        max_tokens=8192,
    )


def _as_configured(box: Box) -> Box:
    to_host_s, to_disk_s = _IDLE_S
    return replace(box, idle_to_host_s=to_host_s + _TICK_S, idle_to_disk_s=to_disk_s + _TICK_S)


def _measure(model: ServedModel, trace: Trace, folder: Path, *, is_cpu_time: bool) -> Figures:
    with tempfile.TemporaryDirectory(dir=folder) as own:
        sessions = SessionSettings(
            persist="write_through", idle_to_host_s=_IDLE_S[0], idle_to_disk_s=_IDLE_S[1]
        )
        settings = EngineSettings(Path(own), capacity=CAPACITY, min_free_bytes=0, sessions=sessions)
        engine = DaemonEngine(model, settings)
        engine.start()
        try:
            clock = engine_clock() if is_cpu_time else time.monotonic
            return _figures(asyncio.run(_replay(engine, trace, clock)))
        finally:
            engine.close()


async def _replay(engine: DaemonEngine, trace: Trace, clock: Clock) -> list[Heard]:
    turns: dict[int, list[TraceRequest]] = {}
    for request in trace.requests:
        turns.setdefault(request.session, []).append(request)
    begin_s = time.monotonic()
    found = await asyncio.gather(
        *(_converse(engine, trace, each, begin_s, clock) for each in turns.values())
    )
    return [heard for each in found for heard in each]


async def _converse(
    engine: DaemonEngine, trace: Trace, turns: list[TraceRequest], begin_s: float, clock: Clock
) -> list[Heard]:
    """Ask one turn after the other, with the answers that came as part of the next prompt."""
    ids: tuple[int, ...] = ()
    found = []
    for request in turns:
        tokens = tuple(_tokens(request, trace.block_tokens))
        ids = (*ids, *tokens[len(ids) :])
        await asyncio.sleep(max(0.0, begin_s + request.arrival_s - time.monotonic()))
        heard = await ask(engine, ids, f"session-{request.session}", request.output_tokens, clock)
        ids = (*ids, *heard.tokens)
        found.append(heard)
    return found


def _tokens(request: TraceRequest, block_tokens: int) -> Iterator[int]:
    """Yield tokens that are equal where blocks have equal names."""
    left = request.input_tokens
    for block in request.block_ids:
        generator = torch.Generator().manual_seed(block)
        yield from torch.randint(32, 127, (block_tokens,), generator=generator).tolist()[:left]
        left -= block_tokens


def _figures(found: Sequence[Heard]) -> Figures:
    begin_s = min(each.asked_s for each in found)
    total_s = max(each.token_s[-1] for each in found) - begin_s
    cached = [each.started.cached for each in found if each.started is not None]
    return Figures(
        total_s=total_s,
        output_tokens_per_s=sum(len(each.tokens) for each in found) / total_s,
        hit_tokens_memory=sum(each.device + each.host for each in cached),
        hit_tokens_device=sum(each.device for each in cached),
        hit_tokens_host=sum(each.host for each in cached),
        hit_tokens_disk=sum(each.disk for each in cached),
        hit_tokens=sum(each.total for each in cached),
        ttft_median_s=statistics.median(each.first_s for each in found),
        ttft_mean_s=statistics.fmean(each.first_s for each in found),
        tbt_mean_s=statistics.fmean(gap for each in found for gap in each.gaps_s),
    )


def _simulated(result: SimResult) -> Figures:
    hits = {
        tier: sum(each.hits[tier] for each in result.outcomes)
        for tier in ("device", "host", "disk")
    }
    num_gaps = sum(count for _, count in result.gaps)
    return Figures(
        total_s=result.span_s,
        output_tokens_per_s=result.output_tokens_per_s,
        hit_tokens_memory=hits["device"] + hits["host"],
        hit_tokens_device=hits["device"],
        hit_tokens_host=hits["host"],
        hit_tokens_disk=hits["disk"],
        hit_tokens=sum(hits.values()),
        ttft_median_s=statistics.median(each.ttft_s for each in result.outcomes),
        ttft_mean_s=statistics.fmean(each.ttft_s for each in result.outcomes),
        tbt_mean_s=sum(gap * count for gap, count in result.gaps) / num_gaps,
    )


def _compare(rounds: Sequence[_Round]) -> dict[str, Any]:
    """Return medians over rounds; errors are those of each round with its own rates."""
    figures = {}
    for name in asdict(rounds[0].simulated):
        measured = [float(getattr(each.measured, name)) for each in rounds]
        simulated = [float(getattr(each.simulated, name)) for each in rounds]
        errors = [told / was - 1 for told, was in zip(simulated, measured, strict=True) if was] or [
            0.0
        ]
        figures[name] = {
            "measured": statistics.median(measured),
            "simulated": statistics.median(simulated),
            "least": min(errors),
            "most": max(errors),
            "error": statistics.median(errors),
        }
    loads = [each.load_average for each in rounds]
    return {"faster": rounds[0].faster, "load_averages": loads, "figures": figures}


def _show(row: dict[str, Any]) -> None:
    table = Table(title=f"{row['faster']:g} times as fast as the trace", title_justify="left")
    for column in ("figure", "measured", "simulated", "error", "least", "most", ""):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name, each in row["figures"].items():
        values = (f"{each[key]:.4g}" for key in ("measured", "simulated"))
        errors = (f"{each[key]:+.1%}" for key in ("error", "least", "most"))
        table.add_row(name, *values, *errors, "" if abs(each["error"]) <= _BAR else "missed")
    Console().print(table)


if __name__ == "__main__":
    main()
