"""LeoAM on three tiers, beside what it replaces, and with each of its parts off in turn.

Layers of the 8B shape over a synthetic context whose keys come in runs of a topic, with 5 % of keys
and values in the ``gpu`` tier, 15 % in the ``cpu`` tier and the rest on disk; all in one run, in
turns. Baselines:

* ``everything``: token-level evaluation, as in the paper's H2O and FlexGen baselines: to know which
  tokens matter, every key is fetched. It attends to what it fetched.
* ``fixed chunks``: chunks of 64 tokens taken whole by their bounds (Quest's score), as many as it
  takes to have the same share of attention as ``leoam`` (the budget is searched for).
* ``h2o``: the tokens that past queries attended to most, whatever is asked now.

Then ``leoam`` with parts off or otherwise: without the tree (all leaves are scored), with leaves of
64 tokens, without the pipeline (one read at a time), with what is likely next read ahead, and with
compressed chunks. (Without abstracts it would be ``everything``.)

    python -m benchmarks.leoam [--contexts N [N ...]] [--batch N ...] [--budget B] [--json FILE]
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from offload.bench.benchmark import Benchmark
from offload.bench.contenders import Entry
from offload.bench.contexts import Context, ContextKind, make_context
from offload.bench.outputs import write_figures
from offload.bench.rows import BenchRow
from offload.bench.settings import BenchSettings, Cell
from offload.index.base import KeyIndex
from offload.index.bounds import BoundsIndex
from offload.index.heavy import HeavyIndex
from offload.presets import Preset, find_preset
from offload.sparse.plan import IndexRecipe
from offload.tiers.eviction import KeepFirst

_MEMORY_SHARE = 0.2
"""A quarter of it is the ``gpu`` tier: 5 % and 15 %."""
_CHUNK_TOKENS = 64
_MASS_STEPS = 6
_MASS_LAYERS = 1


@dataclass(frozen=True)
class Row:
    """One contender on one cell.

    Attributes
    ----------
    mass : float
        Share of attention to what was read, sinks and window left out; mean over queries.
    """

    contender: str
    num_tokens: int
    batch: int
    budget: float
    mass: float
    ms: float
    times_as_fast: float
    low: float
    high: float
    disk_mib: float
    hit_rate: float | None
    hidden: float | None
    error: float | None


def leoam(budget: float) -> Preset:
    """Return the preset without its early layers: the few that are measured stand for the many."""
    preset = find_preset("leoam")
    assert preset.sparse is not None
    return replace(preset, sparse=replace(preset.sparse, budget=budget, early=None))


def with_index(preset: Preset, kind: type[KeyIndex], **options: Any) -> Preset:
    """Return a preset with another index."""
    assert preset.sparse is not None
    return replace(preset, sparse=replace(preset.sparse, index=IndexRecipe(kind, options)))


def with_tree(preset: Preset, **options: Any) -> Preset:
    """Return a preset with other options of its tree."""
    assert preset.sparse is not None
    assert preset.sparse.index is not None
    recipe = preset.sparse.index
    return with_index(preset, recipe.kind, **{**recipe.options, **options})


def fixed_chunks(budget: float) -> Preset:
    """Return chunks of a fixed size, taken whole and read whole."""
    preset = with_index(leoam(budget), BoundsIndex, chunk_tokens=_CHUNK_TOKENS)
    return replace(preset, rows=replace(preset.rows, piece_tokens=None))


def contenders(budget: float, fixed: float, parts: Sequence[str]) -> list[Entry]:
    """Return who takes part; baselines first."""
    ours = leoam(budget)
    eager = replace(ours.rows, reads_ahead=True)
    known = {
        "everything": Entry("everything", Preset("exact", KeepFirst)),
        "fixed chunks": Entry("fixed chunks", fixed_chunks(fixed)),
        "h2o": Entry("h2o", with_index(ours, HeavyIndex)),
        "leoam": Entry("leoam", ours),
        "no tree": Entry("no tree", with_tree(ours, num_levels=1)),
        "leaves of 64": Entry("leaves of 64", with_tree(ours, leaf_tokens=64, num_levels=1)),
        "reads ahead": Entry("reads ahead", replace(ours, rows=eager)),
        "one by one": Entry("one by one", replace(ours, rows=replace(ours.rows, most_in_flight=1))),
        "int8": Entry("int8", ours, "int8"),
        "kivi4": Entry("kivi4", ours, "kivi4"),
        "auto": Entry("auto", ours, "auto"),
    }
    return [known[name] for name in parts]


def masses(context: Context, preset: Preset, budgets: Sequence[float]) -> list[float]:
    """Return the mean share of attention that a preset's choice has, for each budget."""
    assert preset.sparse is not None
    assert preset.sparse.index is not None
    plan, num_tokens = preset.sparse, context.num_tokens
    inner = slice(plan.sink_tokens, num_tokens - plan.window_tokens)
    keys, values = context.keys[:, inner], context.values[:, inner]
    index = plan.index.build(keys, values, None) if plan.index else None
    assert index is not None
    found = torch.zeros(len(budgets))
    queries = _some_queries(context)
    for query in queries:
        shares = torch.softmax(torch.bmm(query, keys.float().mT), -1)
        for number, budget in enumerate(budgets):
            hits = index.search(query, int(budget * num_tokens))
            ids = hits.ids.clamp_min(0).unsqueeze(1).expand(-1, query.shape[1], -1)
            kept = shares.gather(2, ids) * hits.found.unsqueeze(1)
            found[number] += kept.sum(-1).mean()
    return (found / len(queries)).tolist()


def equal_budget(context: Context, wanted: float) -> float:
    """Return the least budget, of a ladder, at which fixed chunks have so much of the attention."""
    ladder = [0.01 * 1.12**i for i in range(41)]
    found = masses(context, fixed_chunks(0.1), ladder)
    return next((b for b, mass in zip(ladder, found, strict=True) if mass >= wanted), 1.0)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Run every cell."""
    for batch in options.batch:
        for num_tokens in options.contexts:
            settings = BenchSettings(
                contexts=(num_tokens,),
                batches=(batch,),
                num_layers=options.layers,
                ram_shares=(_MEMORY_SHARE,),
                contenders=("exact",),
                steps=options.steps,
                rounds=options.rounds,
                context_kind=options.context_kind,
                correlation=options.correlation,
                disk_path=options.disk_path,
            )
            yield from _measure_cell(settings, Cell(num_tokens, batch, _MEMORY_SHARE), options)


def _measure_cell(
    settings: BenchSettings, cell: Cell, options: argparse.Namespace
) -> Iterator[Row]:
    context = make_context(
        settings.shape,
        cell.num_tokens,
        _MASS_STEPS,
        kind=options.context_kind,
        correlation=options.correlation,
    )
    [ours] = masses(context, leoam(options.budget), [options.budget])
    fixed = equal_budget(context, ours)
    entries = contenders(options.budget, fixed, options.parts)
    shares = {entry.name: _mass(context, entry, ours) for entry in entries}
    benchmark = Benchmark(settings, entries)
    with tqdm(total=benchmark.num_steps, unit="step", desc=f"{cell.num_tokens} tokens") as bar:
        for row in benchmark.run(bar.update):
            budget = {"everything": 1.0, "fixed chunks": fixed}.get(row.contender, options.budget)
            yield _row(row, budget, shares[row.contender])


def _mass(context: Context, entry: Entry, ours: float) -> float:
    sparse = entry.policy.sparse if entry.policy else None
    if sparse is None:
        return 1.0
    assert entry.policy is not None
    assert isinstance(sparse.budget, float)
    same = entry.codec != "raw" or entry.name in ("leoam", "reads ahead", "one by one")
    return ours if same else masses(context, entry.policy, [sparse.budget])[0]


def _row(row: BenchRow, budget: float, mass: float) -> Row:
    return Row(
        row.contender,
        row.num_tokens,
        row.batch,
        budget,
        mass,
        row.ms_median,
        row.ratio,
        row.ratio_low,
        row.ratio_high,
        (row.disk_bytes or 0.0) / 2**20,
        row.hit_rate,
        row.hidden_share,
        row.error_median,
    )


def _some_queries(context: Context) -> list[Tensor]:
    """Return scaled queries of the first layer, ``[num_kv_heads, group, dim]`` each."""
    heads, dim = context.keys.shape[0], context.keys.shape[2]
    asked = context.queries[:, :_MASS_LAYERS, 0].float() * dim**-0.5
    return [query.view(heads, -1, dim) for query in asked.flatten(0, 1)]


def report(rows: Sequence[Row]) -> Table:
    """Return the table."""
    table = Table(title="LeoAM on three tiers, 5 : 15 : 80 % of the keys and values")
    for name in ("tokens", "batch", "contender", "budget", "mass", "ms", "times as fast"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for name in ("disk MiB", "hits", "hidden", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.num_tokens),
            str(row.batch),
            row.contender,
            f"{row.budget:.1%}",
            f"{row.mass:.1%}",
            f"{row.ms:.1f}",
            f"{row.times_as_fast:.2f} ({row.low:.2f}-{row.high:.2f})",
            f"{row.disk_mib:.1f}",
            "–" if row.hit_rate is None else f"{row.hit_rate:.0%}",
            "–" if row.hidden is None else f"{row.hidden:.0%}",
            "–" if row.error is None else f"{row.error:.3f}",
        )
    return table


_PARTS = (
    *("everything", "fixed chunks", "h2o", "leoam", "no tree", "leaves of 64"),
    *("reads ahead", "one by one", "int8", "kivi4", "auto"),
)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--correlation", type=float, default=0.9)
    kinds = get_args(ContextKind)
    parser.add_argument("--context-kind", choices=kinds, default="topics")
    parser.add_argument("--parts", nargs="+", default=_PARTS, choices=_PARTS)
    parser.add_argument("--disk-path", type=Path, help="where the disk tier writes")
    parser.add_argument("--json", type=Path, help="write all figures")
    options = parser.parse_args(sys.argv[1:])
    rows = list(measure(options))
    Console(width=130).print(report(rows))
    write_figures(options.json, rows)


if __name__ == "__main__":
    main()
