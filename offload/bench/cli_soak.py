"""``offload bench soak``: a small cache on a faulty disk."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from offload.cli_options import apply_threads, positive_int
from offload.config import format_size
from offload.errors import CorruptChunk
from offload.report import pairs_table
from offload.soak import Gate, SoakReport, soak
from offload.soak_tally import Tally
from offload.tiers.faults import FaultPlan

_FAULTS: Final = "delay=0.05:0.002,hang=0.002:0.8,fail=0.01,full=0.005,truncate=0.01,flip=0.01"
_MINUTES: Final = 1.0
_DESCRIPTION: Final = """Drives a small cache and its forks at random on a disk that is late, hangs,
fails, fills up and damages records, and compares all that comes back with plain tensors. Every
result must be right or an error, and nothing may be lost or left behind. Exits with 0 if so, else
with 1."""


def add_parsers(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the kind."""
    soaking = kinds.add_parser(
        "soak", help="use a cache on a faulty disk for a while", description=_DESCRIPTION
    )
    length = soaking.add_mutually_exclusive_group()
    text = f"how long (default: {_MINUTES:g}); the last round is finished"
    length.add_argument("--minutes", type=_minutes, default=_MINUTES, metavar="M", help=text)
    text = "how many rounds, instead of how long"
    length.add_argument("--rounds", type=positive_int, metavar="N", help=text)
    text = "kind=rate, seconds after a colon, or none (default: %(default)s)"
    soaking.add_argument("--faults", default=_FAULTS, metavar="PLAN", help=text)
    text = "of the first round, the others count on (default: %(default)s)"
    soaking.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    text = "where the disk tier keeps its files (default: the user's cache folder)"
    soaking.add_argument("--disk-path", type=Path, metavar="DIR", help=text)
    text = "threads of torch (default: %(default)s)"
    soaking.add_argument("--threads", type=positive_int, default=1, metavar="N", help=text)
    soaking.add_argument("--json", action="store_true", help="print one JSON object, in bytes")


def run(args: argparse.Namespace) -> int:
    """Soak and print what was found.

    Returns
    -------
    int
        0 if every gate holds, else 1.

    Raises
    ------
    ConfigError
        The plan is none, or the directory cannot be used.
    """
    apply_threads(args)
    faults = FaultPlan.parse(args.faults)
    with _progress(args.rounds, 60 * args.minutes) as goes_on:
        report = soak(args.seed, faults, args.disk_path, goes_on)
    if args.json:
        json.dump(report_data(report), sys.stdout, indent=2)
        print()
    else:
        print_report(report, Console())
    return 0 if report.has_passed else 1


def report_data(report: SoakReport) -> dict[str, Any]:
    """Return the report as plain data, for JSON."""
    gates = [gate._asdict() | {"has_passed": gate.has_passed} for gate in report.gates]
    tally = _fields(report.tally) | {"faults": dataclasses.asdict(report.tally.faults)}
    return _fields(report) | {
        "faults": str(report.faults),
        "tally": tally,
        "gates": gates,
        "has_passed": report.has_passed,
    }


def print_report(report: SoakReport, console: Console) -> None:
    """Print what happened, the gates, and what was found wrong."""
    console.print(pairs_table(_rows(report)), "")
    table = Table("gate", show_edge=False, header_style="bold")
    for name in ("found", "limit", ""):
        table.add_column(name, justify="right")
    for gate in report.gates:
        verdict = "held" if gate.has_passed else "[bold red]failed"
        table.add_row(gate.name, _amount(gate, gate.value), _amount(gate, gate.limit), verdict)
    console.print(table)
    for finding in report.findings:
        console.print(finding, style="red", markup=False, highlight=False, soft_wrap=True)


def _rows(report: SoakReport) -> Iterator[tuple[str, str]]:
    tally = report.tally
    yield "faults", str(report.faults).replace(",", ", ")
    yield "rounds", f"{report.num_rounds}, from seed {report.seed}, in {report.duration_s:.0f} s"
    yield "actions", _counts(tally.actions)
    yield "injected", _counts(dataclasses.asdict(tally.faults))
    yield "raised", _counts(tally.errors)
    yield "compared", f"{tally.num_results} results, {tally.num_chunks} chunks"
    in_use = tally.errors[CorruptChunk.__name__]
    yield "damage refused", f"{in_use} times in use, {tally.num_detected} records in audits"
    yield "refused, then rescued", f"{tally.num_rescued} chunks"
    yield "reset after an error", f"{tally.num_reset} caches"


def _fields(instance: SoakReport | Tally) -> dict[str, Any]:
    """Return the attributes; unlike ``asdict``, this leaves counters whole."""
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def _amount(gate: Gate, value: int) -> str:
    return format_size(value) if gate.is_bytes else str(value)


@contextmanager
def _progress(num_rounds: int | None, duration_s: float) -> Iterator[Callable[[int, float], bool]]:
    """Show a bar in rounds or seconds; yield what says whether there is another round."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("soak", total=duration_s if num_rounds is None else num_rounds)

        def goes_on(rounds: int, seconds: float) -> bool:
            reached = seconds if num_rounds is None else rounds
            progress.update(task, completed=reached, description=f"soak, {rounds} rounds")
            return reached < (duration_s if num_rounds is None else num_rounds)

        yield goes_on


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0.0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return minutes
