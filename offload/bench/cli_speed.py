"""``offload bench attention``, ``decode`` and ``suite``: our caches beside what is used today."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from offload.bench.benchmark import Benchmark
from offload.bench.options import add_options, add_prefill, given_settings
from offload.bench.outputs import ROWS, json_line, open_rows, print_rows, write_page
from offload.bench.provenance import read_provenance
from offload.bench.rows import BenchRow
from offload.bench.settings import BenchSettings
from offload.bench.suites import SUITES, find_suite
from offload.cli_options import apply_threads
from offload.cli_progress import count_progress

_RESULTS: Final = Path("benchmarks/results/bench")
_CONTENDERS: Final = {
    "attention": ("dense", "exact", "adaptive", "retroinfer", "quest", "rekv", "infllm"),
    "decode": ("dynamic", "exact", "adaptive"),
}
_ABOUT: Final = {
    "attention": "layers of attention alone, on contexts that are put straight into the tiers",
    "decode": "steps of a model with random weights, on such contexts or after a prompt",
}


def add_parsers(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the kinds."""
    for level, about in _ABOUT.items():
        text = f"Measures {about}. Contenders by default: {' '.join(_CONTENDERS[level])}."
        parser = kinds.add_parser(level, help=f"time {about}", description=text)
        add_options(parser)
        if level == "decode":
            add_prefill(parser)
    text = "; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items())
    parser = kinds.add_parser(
        "suite",
        help="run a ready list of both",
        description=f"Runs ready settings, which options change. {text}.",
    )
    parser.add_argument("suite", metavar="NAME", help=", ".join(SUITES))
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print tables, and write them.

    Returns
    -------
    int
        0: slow is a result, not a failure.

    Raises
    ------
    ConfigError
        A value is impossible, or what is asked for needs another machine.
    CapacityError
        The contenders do not fit into memory together.
    """
    apply_threads(args)
    benchmarks = [Benchmark(settings) for settings in _settings(args)]
    name = args.suite if args.bench == "suite" else args.bench
    folder = args.output or _RESULTS / name
    made_by = read_provenance()
    rows = []
    with open_rows(folder) as file:
        for row in _measure(name, benchmarks):
            rows.append(row)
            # At once, so that a run that is interrupted leaves what it found.
            print(json_line(name, row, made_by), file=file, flush=True)
    page = write_page(name, rows, made_by, folder, has_plots=args.plots)
    if args.json:
        print((folder / ROWS).read_text(), end="")
    else:
        print_rows(rows, page)
    return 0


def _settings(args: argparse.Namespace) -> list[BenchSettings]:
    if args.bench != "suite":
        given = given_settings(args, _CONTENDERS[args.bench])
        return [BenchSettings(level=args.bench, **given)]
    return [
        BenchSettings(**{**part, **given_settings(args, part["contenders"])})
        for part in find_suite(args.suite).parts
    ]


def _measure(name: str, benchmarks: list[Benchmark]) -> Iterator[BenchRow]:
    total, num_done = sum(benchmark.num_steps for benchmark in benchmarks), 0
    with count_progress(f"bench {name}", "steps") as progress:

        def advance() -> None:
            nonlocal num_done
            num_done += 1
            progress(num_done, total)

        for benchmark in benchmarks:
            yield from benchmark.run(advance)
