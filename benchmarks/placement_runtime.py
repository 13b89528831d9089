"""What placing chunks by attention brings a cache that runs, beside leaving them where they were.

Layers of the 8B shape over a synthetic context whose queries keep what they look for for some steps
and then jump, with a fifth of keys and values in memory and the rest on disk; all placements in one
run, step by step in turns. Of the rows that steps read: found in a tier's memory, found there or in
the cache of lines, and bytes read from disk (decoded), exchanges included. Of codecs: what files
take up in the end, and the error of the last steps' outputs against exact attention.

    python -m benchmarks.placement_runtime [--policy leoam adaptive] [--line-share 0.75 0]
                                           [--codec raw int8 kivi4 importance]
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from offload import OffloadedCache
from offload.bench.contexts import ContextKind, make_context
from offload.bench.counters import Counts, between, read_counts
from offload.bench.drivers import AttentionDriver
from offload.bench.measure import relative_errors
from offload.bench.outputs import write_figures
from offload.bench.placement import place
from offload.bench.settings import BenchSettings, Cell
from offload.placement import PLACEMENTS
from offload.presets import Preset, customised

_CHECKED = 8
"""Steps whose outputs are compared."""


@dataclass
class Row:
    """One placement under one policy; shares are of the rows read, the others are per step."""

    policy: str
    line_share: float
    placement: str
    codec: str
    in_tiers: float = 0.0
    in_memory: float = 0.0
    disk_mib: float = 0.0
    moved: float = 0.0
    failed: float = 0.0
    ms: float = 0.0
    folder_mib: float = 0.0
    error: float = 0.0


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Run every policy with every size of the cache of lines."""
    settings = BenchSettings(
        contexts=(options.tokens,),
        ram_shares=(options.memory,),
        num_layers=options.layers,
        rounds=1,
        steps=options.warm_up + options.steps,
        context_kind=options.context_kind,
        correlation=options.correlation,
        disk_path=options.disk_path,
        device="cpu",
    )
    cell = Cell(options.tokens, 1, options.memory)
    context = make_context(
        settings.shape,
        options.tokens,
        settings.num_steps,
        num_layers=options.layers,
        kind=settings.context_kind,
        correlation=options.correlation,
    )
    driver = AttentionDriver(settings, cell, context)
    for policy, line_share in product(options.policy, options.line_share):
        preset = customised(policy, budget=options.budget, dense_layers=0, line_share=line_share)
        if preset.sparse is not None:  # a few layers stand for many, none of which is early
            preset = replace(preset, sparse=replace(preset.sparse, early=None))
        yield from _compare(driver, preset, line_share, options)


def _compare(
    driver: AttentionDriver, preset: Preset, line_share: float, options: argparse.Namespace
) -> list[Row]:
    """Make the same steps on a cache of each placement, in turns."""
    rows = [
        Row(preset.name, line_share, name, codec)
        for name, codec in product(options.placement, options.codec)
        if (name, codec) != ("first", "importance")
    ]
    tiers = place(driver.settings, driver.cell, has_device=False)
    with ExitStack() as stack, torch.no_grad():
        caches = [
            stack.enter_context(
                OffloadedCache(
                    tiers.tiers,
                    policy=preset,
                    placement=row.placement,
                    codec=row.codec,
                    capacity=tiers.capacity,
                    disk_path=driver.settings.disk_path,
                    config=driver.config,
                )
            )
            for row in rows
        ]
        for cache in caches:
            driver.fill(cache)
            cache.flush()
        before: list[Counts] = []
        times = [list[float]() for _ in rows]
        errors = [list[float]() for _ in rows]
        num_steps = options.warm_up + options.steps
        for step in tqdm(range(num_steps), desc=preset.name, leave=False, disable=None):
            if step == options.warm_up:
                before = [read_counts(cache) for cache in caches]
            expected = driver.expected(step) if step >= num_steps - _CHECKED else None
            for number, cache in enumerate(caches):
                started = time.perf_counter()
                found = driver.step(cache, step)
                times[number].append(time.perf_counter() - started)
                if expected is not None:
                    errors[number] += relative_errors(found.float(), expected)
        for number, (cache, row) in enumerate(zip(caches, rows, strict=True)):
            _fill_in(row, between(before[number], read_counts(cache)), options.steps)
            row.ms = 1000 * median(times[number][options.warm_up :])
            row.error = median(errors[number])
            row.folder_mib = _folder_bytes(cache) / 2**20
    return rows


def _fill_in(row: Row, counts: Counts, num_steps: int) -> None:
    read, missed = counts["retrieved_tokens"], counts["rows.line_lookups"]
    row.in_tiers = 1 - missed / read
    row.in_memory = 1 - (missed - counts["rows.line_hits"]) / read
    row.disk_mib = counts["disk.loaded_bytes"] / num_steps / 2**20
    row.moved = (counts["promoted_chunks"] + counts["demoted_chunks"]) / num_steps
    row.failed = counts["failed_exchanges"] / num_steps


def _folder_bytes(cache: OffloadedCache) -> int:
    """Return what the files of the disk tier take up; holes take nothing."""
    assert cache.disk_folder is not None
    return sum(512 * path.stat().st_blocks for path in cache.disk_folder.rglob("*"))


def report(rows: list[Row]) -> Table:
    """Return the table."""
    table = Table(show_edge=False)
    texts = ("policy", "placement", "codec")
    numbers = ("lines", "in tiers", "in memory", "disk MiB", "moved", "ms", "files MiB", "error")
    for name in (*texts, *numbers):
        table.add_column(name, justify="left" if name in texts else "right")
    for row in rows:
        shares = (f"{row.in_tiers:.1%}", f"{row.in_memory:.1%}")
        rest = (f"{row.disk_mib:.2f}", f"{row.moved:.1f}", f"{row.ms:.1f}")
        stored = (f"{row.folder_mib:.0f}", f"{row.error:.3f}")
        names = (row.policy, row.placement, row.codec, f"{row.line_share:.2f}")
        table.add_row(*names, *shares, *rest, *stored)
    return table


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", nargs="+", default=["leoam", "adaptive"])
    parser.add_argument("--placement", nargs="+", default=PLACEMENTS, choices=PLACEMENTS)
    parser.add_argument("--codec", nargs="+", default=["raw"])
    parser.add_argument("--line-share", type=float, nargs="+", default=[0.75, 0.0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--memory", type=float, default=0.2, help="share of keys and values")
    parser.add_argument("--budget", type=float, default=0.03)
    parser.add_argument("--warm-up", type=int, default=64, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--correlation", type=float, default=0.95)
    kinds: tuple[ContextKind, ...] = ("topics", "parametric")
    parser.add_argument("--context-kind", default=kinds[0], choices=kinds)
    parser.add_argument("--disk-path", type=Path, help="where the disk tier writes")
    parser.add_argument("--json", type=Path, help="write all figures")
    options = parser.parse_args(sys.argv[1:])
    torch.set_num_threads(1)
    rows = list(measure(options))
    Console(width=110, highlight=False).print(report(rows))
    write_figures(options.json, rows)


if __name__ == "__main__":
    main()
