"""``offload bench simulate``: a trace of requests on boxes that are not there."""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from rich.console import Console
from rich.table import Table

from offload.bench.scale_model import Prices
from offload.bench.sim_cluster import Routing
from offload.bench.sim_machine import BOXES, Box, read_box
from offload.bench.sim_plot import draw_panels, sweep_panels
from offload.bench.sim_sweep import FULL, SweepRow, cost_table, first_saturated, row_json, sweep
from offload.bench.sim_trace import MOONCAKE_BLOCK_TOKENS, Trace, read_trace, write_trace
from offload.bench.sim_workload import Workload, synthesize
from offload.cli_options import positive_int
from offload.cli_progress import count_progress
from offload.errors import ConfigError
from offload.machine import existing_parent
from offload.tiers.scratch import default_parent

Data = TypeVar("Data", Box, Prices, Workload)

_MEASURE: Final = "measure"
_ABOUT: Final = "Replays a trace on simulated boxes: hits, waits, and what is full first."


def add_parsers(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the kind."""
    parser = kinds.add_parser(
        "simulate", help="replay a trace of requests on simulated boxes", description=_ABOUT
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--trace", type=Path, metavar="FILE", help="JSONL, in Mooncake's format")
    names = ", ".join(each.name for each in fields(Workload))
    text = f"of a synthetic trace, per box: {names}"
    source.add_argument("--synthetic", nargs="*", default=[], metavar="NAME=N", help=text)
    text = f"{', '.join(BOXES)} (assumed), a JSON file, or {_MEASURE}: this machine's, with the "
    text += "recall model (default: %(default)s)"
    parser.add_argument("--machine", default="8b", metavar="M", help=text)
    text = "change what a box is, such as remote_bytes=1e13"
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=N", help=text)
    names = ", ".join(each.name for each in fields(Prices))
    text = f"US dollars: {names}; the defaults are assumptions"
    parser.add_argument("--prices", nargs="+", default=[], metavar="NAME=N", help=text)
    many: dict[str, Any] = {"nargs": "+", "metavar": "N"}
    parser.add_argument("--boxes", type=positive_int, default=[1], help="how many", **many)
    text = "so many times as many sessions at once"
    parser.add_argument("--load", type=float, default=[1.0], help=text, **many)
    parser.add_argument("--routing", choices=get_args(Routing), default="affinity")
    text = "tokens of a block of the trace (default: %(default)s)"
    parser.add_argument(
        "--block-tokens", type=positive_int, default=MOONCAKE_BLOCK_TOKENS, metavar="N", help=text
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--write-trace", type=Path, metavar="FILE", help="keep the trace")
    parser.add_argument("--write-machine", type=Path, metavar="FILE", help="keep the box")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Simulate, and print what was found.

    Returns
    -------
    int
        0

    Raises
    ------
    ConfigError
        A value is impossible, or a file cannot be read or written.
    """
    prices = with_values(Prices(), args.prices)
    trace_of = _traces(args)
    box = with_values(_box(args.machine), args.set)
    _write(args, trace_of, box)
    with count_progress("simulate", "runs") as progress:
        rows = sweep(
            trace_of,
            box,
            args.boxes,
            args.load,
            args.routing,
            args.seed,
            is_steady=args.trace is None,
            progress=progress,
        )
    if args.plot is not None:
        draw_panels(sweep_panels(box.name, rows), args.plot)
    inputs = [each.input_tokens for row in rows for each in row.result.outcomes]
    costs = cost_table(box, prices, sum(inputs) / len(inputs))
    if args.json:
        found = {"box": box.to_json(), "rows": [row_json(row, prices) for row in rows]}
        print(json.dumps({**found, "cached_tokens": costs}))
    else:
        _print(rows, costs, prices)
    return 0


def with_values(data: Data, texts: list[str]) -> Data:
    """Return the same with the fields that ``NAME=N`` changes.

    Raises
    ------
    ConfigError
        There is no such field, or no such number.
    """
    known = {each.name for each in fields(data)}
    changes: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(f"{text!r}: NAME is one of {', '.join(sorted(known))}")
        try:
            number = float(value)
        except ValueError as error:
            raise ConfigError(f"{text!r}: {value!r} is not a number") from error
        changes[name] = _like(getattr(data, name), number, text)
    return replace(data, **changes)


def _like(before: object, number: float, text: str) -> float | int | bool:
    if isinstance(before, str):
        raise ConfigError(f"{text!r}: this is no number")
    if isinstance(before, bool):
        return bool(number)
    return int(number) if isinstance(before, int) else number


def _traces(args: argparse.Namespace) -> Callable[[int], Trace]:
    """Return the trace for so many boxes; a synthetic one grows with them."""
    if args.trace is not None:
        trace = read_trace(args.trace, args.block_tokens)
        return lambda num_boxes: trace
    workload = with_values(Workload(), args.synthetic)

    def synthetic(num_boxes: int) -> Trace:
        grown = replace(
            workload,
            sessions=workload.sessions * num_boxes,
            sessions_per_s=workload.sessions_per_s * num_boxes,
        )
        return synthesize(grown, args.seed, args.block_tokens)

    return synthetic


def _box(machine: str) -> Box:
    if machine != _MEASURE:
        return read_box(machine)
    # Loads torch's models, which nothing else here needs.
    from offload.bench.sim_measure import measure_box
    from offload.daemon.served_model import load_served_model

    with count_progress("measure", "rounds") as progress:
        folder = existing_parent(default_parent())
        return measure_box(load_served_model(), folder, progress=progress)


def _write(args: argparse.Namespace, trace_of: Callable[[int], Trace], box: Box) -> None:
    try:
        if args.write_trace is not None:
            write_trace(args.write_trace, trace_of(args.boxes[0]))
        if args.write_machine is not None:
            args.write_machine.write_text(json.dumps(box.to_json(), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot be written: {error}") from error


def _print(rows: list[SweepRow], costs: list[dict[str, Any]], prices: Prices) -> None:
    console = Console()
    table = Table(title="per box: requests and tokens per second", title_justify="left")
    names = ("boxes", "load", "requests", "tokens", "hits", "device host disk remote")
    for name in (*names, "first p50", "p99 s", "next p50", "p99 ms", "fullest part"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    full = first_saturated(rows)
    if full is not None:
        part = full.result.busiest
        console.print(f"full first: {part}, at {full.turns_per_s:.3g} requests/s and box")
    else:
        console.print(f"nothing is full: no part is used for {FULL:.0%} of the time")
    table = Table(title="a million cached tokens", title_justify="left")
    for name in ("tier", "USD a month", "pays if reused within", "tokens that fit"):
        table.add_column(name, justify="right")
    for each in costs:
        days = f"{each['break_even_s'] / 86400:.3g} days"
        table.add_row(each["tier"], f"{each['usd_per_month']:.3g}", days, f"{each['tokens']:,}")
    console.print(table)
    console.print(f"assumed prices, USD: {_listed(asdict(prices))}", style="dim")


def _cells(row: SweepRow) -> tuple[str, ...]:
    result = row.result
    shares = " ".join(f"{share:.0%}" for share in result.hit_share.values())
    return (
        str(row.num_boxes),
        f"{row.load:g}",
        f"{row.turns_per_s:.3g}",
        f"{result.output_tokens_per_s / row.num_boxes:.4g}",
        f"{sum(result.hit_share.values()):.0%}",
        shares,
        f"{result.ttft_s(0.5):.3g}",
        f"{result.ttft_s(0.99):.3g}",
        f"{1e3 * result.tbt_s(0.5):.3g}",
        f"{1e3 * result.tbt_s(0.99):.3g}",
        f"{result.busiest} {result.utilisation[result.busiest]:.0%}",
    )


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
