"""Attention next to the disk against streaming everything from it, as batches grow.

Layers of the 8B shape, nothing of whose keys and values is kept in memory:

* ``flexgen``: every chunk is read from disk at every step, while the one before is attended to; our
  own exact streaming, which reads at the speed of the disk.
* ``instinfer:dense``: storage-side workers attend to every token.
* ``instinfer:BUDGET:...``: SparF.

Reads bypass the page cache. ``--memory-share`` gives both sides as much memory: streaming keeps
chunks in it, workers channels and tokens. Each is compared with ``flexgen`` on the same disk, in
turns; pairs are measured one after the other, because each holds a copy of the keys and values.

    python -m benchmarks.instinfer [--batch N ...] [--context N] [--layers N] [--json FILE]
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from offload.bench.benchmark import Benchmark
from offload.bench.outputs import write_figures
from offload.bench.rows import BenchRow
from offload.bench.settings import BenchSettings

_CONTENDERS = ("instinfer:dense", "instinfer:0.03125:group=64", "instinfer:0.0625")


@dataclass(frozen=True)
class Row:
    """One contender on one cell, beside streaming in the same turns."""

    contender: str
    batch: int
    num_tokens: int
    num_layers: int
    kv_gib: float
    tokens_per_s: float
    streaming_tokens_per_s: float
    times_as_fast: float
    low: float
    high: float
    memory_share: float | None
    query_cosine: float
    disk_mib: float
    streaming_disk_mib: float
    bus_kb_per_token_and_layer: float
    error: float | None


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Run every cell with every contender."""
    for batch in options.batch:
        for contender in options.contenders:
            settings = _settings(options, batch, contender)
            benchmark = Benchmark(settings)
            title = f"batch {batch}, {contender}"
            with tqdm(total=benchmark.num_steps, unit="step", desc=title) as bar:
                streaming, ours = benchmark.run(bar.update)
            yield _row(streaming, ours)


def _settings(options: argparse.Namespace, batch: int, contender: str) -> BenchSettings:
    """Return what is measured of one pair, both with the same memory if there is any."""
    settings = BenchSettings(
        contexts=(options.context,),
        batches=(batch,),
        num_layers=options.layers,
        contenders=("flexgen", contender),
        steps=options.steps,
        rounds=options.rounds,
        context_kind=options.context_kind,
        correlation=options.correlation,
        ram_shares=(options.memory_share,),
        disk_path=options.disk_path,
    )
    if options.memory_share is None:
        return settings
    [cell] = settings.cells()
    memory_bytes = int(options.memory_share * settings.kv_bytes(cell))
    ours = f"{contender}:memory={memory_bytes}"
    return replace(settings, contenders=("flexgen", ours))


def _row(streaming: BenchRow, ours: BenchRow) -> Row:
    assert ours.bus_bytes is not None
    return Row(
        ours.contender,
        ours.batch,
        ours.num_tokens,
        ours.num_layers,
        ours.kv_bytes / 2**30,
        ours.tokens_per_s,
        streaming.tokens_per_s,
        ours.ratio,
        ours.ratio_low,
        ours.ratio_high,
        ours.ram_share,
        ours.query_cosine,
        (ours.disk_bytes or 0.0) / 2**20,
        (streaming.disk_bytes or 0.0) / 2**20,
        ours.bus_bytes / ours.batch / ours.num_layers / 1e3,
        ours.error_median,
    )


def report(rows: Sequence[Row]) -> Table:
    """Return the table."""
    table = Table(title="Attention next to the disk against streaming all of it")
    for name in ("batch", "contender", "KV GiB", "tokens/s", "streaming", "times as fast"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for name in ("disk MiB", "bus KB/token/layer", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.batch),
            row.contender,
            f"{row.kv_gib:.1f}",
            f"{row.tokens_per_s:.2f}",
            f"{row.streaming_tokens_per_s:.2f}",
            f"{row.times_as_fast:.2f} ({row.low:.2f}-{row.high:.2f})",
            f"{row.disk_mib:.1f} / {row.streaming_disk_mib:.0f}",
            f"{row.bus_kb_per_token_and_layer:.1f}",
            "–" if row.error is None else f"{row.error:.3f}",
        )
    return table


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--context", type=int, default=32768, help="tokens (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", default=_CONTENDERS)
    parser.add_argument("--memory-share", type=float, help="of the KV, in memory; both get it")
    parser.add_argument("--correlation", type=float, default=0.9, help="of successive queries")
    parser.add_argument("--context-kind", default="topics")
    parser.add_argument("--disk-path", type=Path, help="where the disk tier writes")
    parser.add_argument("--json", type=Path, help="write all figures")
    options = parser.parse_args(sys.argv[1:])
    rows = list(measure(options))
    Console(width=130).print(report(rows))
    write_figures(options.json, rows)


if __name__ == "__main__":
    main()
