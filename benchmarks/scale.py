"""The tables and the picture of docs/scale.md: from one box to a thousand.

    python -m benchmarks.scale [--quick] [--plot FILE] [--json FILE] > tables.md

What boxes are made of, and what they cost, is assumed (`offload/bench/sim_machine.py`,
`offload/bench/scale_model.py`); what follows from it is computed, by formulas and by simulation.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from offload.bench.provenance import read_provenance
from offload.bench.scale_model import (
    Prices,
    Turn,
    demands_s,
    hit_tokens,
    mean_turn,
    most_rows,
    most_turns_per_s,
)
from offload.bench.sim_cluster import Routing, simulate
from offload.bench.sim_machine import BOXES, Box
from offload.bench.sim_plot import Panel, draw_panels
from offload.bench.sim_result import SimResult
from offload.bench.sim_sweep import cost_table, steady_window_s
from offload.bench.sim_workload import Workload, synthesize
from offload.cli_progress import count_progress

WORKLOAD: Final = Workload(
    turns=8.0,
    think_s=60.0,
    first_tokens=6000.0,
    more_tokens=400.0,
    output_tokens=300.0,
    system_prompts=4,
    system_tokens=1024,
)
_LOADS: Final = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25)
_BOXES: Final = (1, 10, 100, 1000)
_MOST_SIMULATED: Final = 20
"""Boxes; more are simulated by so many, which share as much less of the store."""

_IO_BYTES: Final = 256 << 10
"""A chunk of 64 tokens of one layer: what the disk tier reads and writes at a time."""

_STORE_BYTES_PER_S: Final = 100e9
_NETS: Final = {"10": 1.25e9, "100": 12.5e9}
_PRICES: Final = {"8b": Prices(), "70b": Prices(box_usd_per_hour=12.0)}

Table = list[dict[str, Any]]


@dataclass(slots=True)
class _Run:
    """How long is simulated, and who is told that a simulation is done."""

    seconds: float
    done: Callable[[], object]

    def simulate(
        self, box: Box, turns_per_s: float, num_boxes: int = 1, routing: Routing = "affinity"
    ) -> SimResult:
        """Simulate so many turns per second and box."""
        per_s = turns_per_s / WORKLOAD.turns * num_boxes
        count = max(20, int(per_s * self.seconds))
        trace = synthesize(replace(WORKLOAD, sessions=count, sessions_per_s=per_s), seed=1)
        window_s = steady_window_s(trace)
        result = simulate(trace, box, num_boxes, routing, seed=1, window_s=window_s)
        self.done()
        return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute all tables; print them, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="short and few simulations")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    turn = mean_turn(WORKLOAD)
    total = 2 * (len(_LOADS) + len(_BOXES)) + 7
    with count_progress("scale", "simulations") as progress:
        count = iter(range(1, total + 1))
        run = _Run(150.0 if options.quick else 2400.0, lambda: progress(next(count), total))
        tables = {
            "What a turn asks of a box": _demand_rows(turn),
            "One box under load": [row for name in BOXES for row in _load_rows(name, turn, run)],
            "From one box to a thousand": [
                row for name in BOXES for row in _box_rows(name, turn, run)
            ],
            "What the remote tier changes": list(_remote_rows(turn, run)),
            "A million cached tokens": _cost_rows(turn),
        }
    for title, rows in tables.items():
        print(f"**{title}**\n")
        print("\n".join(_markdown(rows)), end="\n\n")
    if options.plot is not None:
        draw_panels(_panels(tables), options.plot)
    if options.json is not None:
        found = {
            **asdict(read_provenance()),
            "workload": asdict(WORKLOAD),
            "boxes": {name: box.to_json() for name, box in BOXES.items()},
            "prices": {name: asdict(each) for name, each in _PRICES.items()},
            "tables": tables,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _demand_rows(turn: Turn) -> Table:
    rows = []
    for name, plain in BOXES.items():
        box = _with_remote(plain)
        most, part = most_turns_per_s(box, turn)
        hits = hit_tokens(box, turn, most)
        needs = demands_s(box, turn, hits)
        rows.append(
            {
                "model": name,
                **{f"{part} ms": f"{1e3 * need:.3g}" for part, need in needs.items()},
                "turns/s": f"{most:.2f}",
                "full first": part,
                "rows": most_rows(box, turn),
                "device, host, disk": _shares(
                    hits[tier] / turn.input_tokens for tier in ("device", "host", "disk")
                ),
            }
        )
    return rows


def _load_rows(name: str, turn: Turn, run: _Run) -> Table:
    box = BOXES[name]
    most, _ = most_turns_per_s(box, turn)
    rows = []
    for load in _LOADS:
        found = run.simulate(box, load * most)
        done = len(found.outcomes) / found.span_s
        hits = hit_tokens(box, turn, done)
        needs = demands_s(box, turn, hits)
        rows.append(
            {
                "model": name,
                "load": f"{load:.0%}",
                "turns/s": f"{done:.2f}",
                "tokens/s": f"{found.output_tokens_per_s:.0f}",
                "hits": f"{sum(found.hit_share.values()):.0%}",
                "formula": f"{sum(hits.values()) / turn.input_tokens:.0%}",
                "compute": f"{found.utilisation['compute']:.2f}",
                "formula ": f"{done * needs['compute']:.2f}",
                "disk": f"{found.utilisation['disk']:.2f}",
                "formula  ": f"{done * needs['disk']:.2f}",
                "first token p50, p99 s": f"{found.ttft_s(0.5):.2f}, {found.ttft_s(0.99):.2f}",
                "next p50, p99 ms": f"{1e3 * found.tbt_s(0.5):.0f}, {1e3 * found.tbt_s(0.99):.0f}",
            }
        )
    return rows


def _box_rows(name: str, turn: Turn, run: _Run) -> Table:
    box = _with_remote(BOXES[name])
    most, _ = most_turns_per_s(box, turn)
    rows = []
    for count in _BOXES:
        limit, part = most_turns_per_s(box, turn, count)
        few = min(count, _MOST_SIMULATED)
        shared = replace(box, store_bytes_per_s=_STORE_BYTES_PER_S * few / count)
        found = run.simulate(shared, 0.8 * most, few)
        rate = count / few
        disk = rate * found.bytes_per_s["disk"]
        rows.append(
            {
                "model": name,
                "boxes": f"{count:,}",
                "tokens/s": f"{rate * found.output_tokens_per_s:,.0f}",
                "prompt tokens/s": _short(rate * _inputs(found) / found.span_s),
                "disk GB/s": f"{disk / 1e9:,.1f}",
                "disk IOPS": _short(disk / _IO_BYTES),
                "bus GB/s": f"{rate * found.bytes_per_s['bus'] / 1e9:,.1f}",
                "for the store GB/s": f"{rate * found.bytes_per_s['net_out'] / 1e9:,.1f}",
                "store used": f"{found.utilisation['store_in']:.2f}",
                "fullest part": found.busiest,
                "formula: turns/s and box, part": f"{limit:.2f}, {part}",
            }
        )
    return rows


def _remote_rows(turn: Turn, run: _Run) -> Iterable[dict[str, Any]]:
    plain = BOXES["8b"]
    load = 0.6 * most_turns_per_s(plain, turn)[0]
    kinds: list[tuple[str, Box, Routing]] = [
        ("none, sessions stay", plain, "affinity"),
        ("none, any box", plain, "random"),
    ]
    for net, speed in _NETS.items():
        for latency_s in (0.03, 0.2):
            box = _with_remote(plain, speed, latency_s)
            kinds.append((f"{net} Gbit/s, {1e3 * latency_s:.0f} ms, any box", box, "random"))
    slow = replace(_with_remote(plain), is_choosy=False)
    kinds.append(("10 Gbit/s, 30 ms, any box, always read", slow, "random"))
    for title, box, routing in kinds:
        found = run.simulate(box, load, 8, routing)
        yield {
            "remote tier, routing": title,
            "own, remote": _shares(
                (
                    sum(found.hit_share[tier] for tier in ("device", "host", "disk")),
                    found.hit_share["remote"],
                )
            ),
            "compute": f"{found.utilisation['compute']:.2f}",
            "net": f"{found.utilisation['net_in']:.2f}",
            "first token p50, p99 s": f"{found.ttft_s(0.5):.2f}, {found.ttft_s(0.99):.2f}",
        }


def _cost_rows(turn: Turn) -> Table:
    rows = []
    for name, box in BOXES.items():
        prices = _PRICES[name]
        again = prices.computed_usd(box, turn.input_tokens)
        rows += [
            {
                "model": name,
                "tier": each["tier"],
                "USD per GiB and month": f"{getattr(prices, each['tier']):g}",
                "USD per million tokens and month": f"{each['usd_per_month']:,.3g}",
                "computed again USD": f"{again:.3g}",
                "pays if reused within": _duration(each["break_even_s"]),
            }
            for each in cost_table(box, prices, turn.input_tokens)
        ]
    return rows


def _with_remote(box: Box, speed: float = _NETS["10"], latency_s: float = 0.03) -> Box:
    return replace(
        box,
        remote_bytes=1 << 50,
        store_bytes_per_s=_STORE_BYTES_PER_S,
        net_bytes_per_s=speed,
        remote_latency_s=latency_s,
    )


def _inputs(found: SimResult) -> int:
    return sum(each.input_tokens for each in found.outcomes)


def _shares(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.0%}" for value in values)


def _short(value: float) -> str:
    return f"{value / 1e6:,.1f} M" if value >= 1e6 else f"{value / 1e3:,.1f} K"


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _markdown(rows: Table) -> list[str]:
    names = list(rows[0])
    cells = [[str(value) for value in row.values()] for row in rows]
    return [f"| {' | '.join(each)} |" for each in (names, ["---"] * len(names), *cells)]


def _panels(tables: dict[str, Table]) -> list[Panel]:
    panels = []
    for name in BOXES:
        rows = [row for row in tables["One box under load"] if row["model"] == name]
        loads = [float(row["turns/s"]) for row in rows]
        columns = (("compute", "compute"), ("compute, formula", "formula "), ("disk", "disk"))
        curves = {
            label: [(load, float(row[column])) for load, row in zip(loads, rows, strict=True)]
            for label, column in (*columns, ("disk, formula", "formula  "))
        }
        label = "turns per second"
        panels.append(Panel(f"{name}: parts of one box", label, "utilisation", curves))
    waits, tokens = {}, {}
    for name in BOXES:
        rows = [row for row in tables["One box under load"] if row["model"] == name]
        for number, which in enumerate(("p50", "p99")):
            waits[f"{name} {which}"] = [
                (
                    float(row["turns/s"]),
                    float(row["first token p50, p99 s"].split(",")[number]),
                )
                for row in rows
            ]
        rows = [row for row in tables["From one box to a thousand"] if row["model"] == name]
        for column in ("tokens/s", "for the store GB/s"):
            tokens[f"{name} {column}"] = [
                (_number(row["boxes"]), max(_number(row[column]), 1e-2)) for row in rows
            ]
    panels.append(
        Panel("time to the first token", "turns per second and box", "s", waits, has_log_y=True)
    )
    panels.append(Panel("all boxes", "boxes", "", tokens, has_log_x=True, has_log_y=True))
    return panels


def _number(text: str) -> float:
    return float(text.replace(",", ""))


if __name__ == "__main__":
    main()
