"""How far SparF is off, by the channels and the tokens that it reads.

Each query is asked by itself over the keys between sinks and window, which are attended exactly;
the error is that of the merged output, relative to exact attention. Heads are made from parameters,
or a dump of a model (``tools/dump_qkv``). ``bytes`` are those read of what exact attention reads:
channels in 8 bits, groups of tokens as they are.

    python -m benchmarks.sparf_error [--dump FILE] [--tokens N ...] [--json FILE]
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from offload.bench.outputs import write_figures
from offload.bench.rows import percentile
from offload.evals.heads import Head, dumped_heads, parametric_heads
from offload.evals.parametric import FLAT, MEDIUM, SHARP
from offload.evals.problem import Problem
from offload.kernels.reference import merge
from offload.kernels.rows import attend_to
from offload.kernels.sparf import sparf

_CHANNEL_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
_TOKEN_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8)
_GROUPS = (16, 64)


@dataclass(frozen=True)
class Row:
    """One choice of channels, tokens and groups, over the heads of one kind."""

    heads: str
    num_keys: int
    channel_share: float
    token_share: float
    group_tokens: int
    bytes_share: float
    error_median: float
    error_p95: float


def measure(heads: Sequence[Head]) -> Iterator[Row]:
    """Yield a row for each choice and kind of heads."""
    kinds = sorted({(head.problem.num_keys, head.head_class) for head in heads})
    choices = list(product(kinds, _GROUPS, _CHANNEL_SHARES, _TOKEN_SHARES))
    for (num_keys, kind), group, channels, tokens in tqdm(choices, unit="choice"):
        errors = [
            error
            for head in heads
            if (head.problem.num_keys, head.head_class) == (num_keys, kind)
            for error in _errors(head.problem, channels, tokens, group)
        ]
        dim_bytes = heads[0].problem.keys.element_size() * 2
        share = channels / dim_bytes + tokens
        yield Row(
            kind, num_keys, channels, tokens, group, share, median(errors), percentile(errors, 0.95)
        )


def _errors(problem: Problem, channels: float, tokens: float, group: int) -> list[float]:
    inner = slice(64, problem.num_keys - 64 - problem.num_keys % 64)
    keys, values = problem.keys[:, inner], problem.values[:, inner]
    num_groups = max(1, int(tokens * keys.shape[1]) // group)
    outer = [slice(0, inner.start), slice(inner.stop, None)]
    near = torch.cat([torch.cat([problem.keys, problem.values], -1)[:, part] for part in outer], 1)
    have = torch.ones(near.shape[:2], dtype=torch.bool)
    found = []
    for number, query in enumerate(problem.queries):
        asked = query[None, None]
        far = sparf(asked, keys, values, round(channels * query.numel()), num_groups, group)
        out = merge([far, attend_to(asked, near, have)]).out[0, 0]
        exact = problem.out[number]
        found.append(float((out - exact).norm() / exact.norm()))
    return found


def report(rows: Sequence[Row]) -> Table:
    """Return the table, one line for each choice of channels and tokens."""
    table = Table(title="Relative error of SparF: median (95th percentile)")
    kinds = list(dict.fromkeys((row.heads, row.num_keys, row.group_tokens) for row in rows))
    for name in ("r / d", "k / S", "bytes"):
        table.add_column(name, justify="right")
    for kind, num_keys, group in kinds:
        table.add_column(f"{kind}, {num_keys // 1024}K, by {group}", justify="right")
    for channels, tokens in product(_CHANNEL_SHARES, _TOKEN_SHARES):
        line = [row for row in rows if (row.channel_share, row.token_share) == (channels, tokens)]
        cells = [f"{row.error_median:.3f} ({row.error_p95:.2f})" for row in line]
        shares = (f"1/{1 / channels:.0f}", f"1/{1 / tokens:.0f}", f"{line[0].bytes_share:.1%}")
        table.add_row(*shares, *cells)
    return table


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dump", type=Path, help="queries, keys and values of a model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--heads", type=int, default=2, help="of each temperature")
    parser.add_argument("--json", type=Path, help="write all figures")
    options = parser.parse_args(sys.argv[1:])
    if options.dump is not None:
        heads = list(dumped_heads(options.dump))
    else:
        kinds = (FLAT, MEDIUM, SHARP)
        count = options.heads
        heads = list(parametric_heads(options.tokens, kinds, options.queries, num_heads=count))
    rows = list(measure(heads))
    Console(width=180).print(report(rows))
    write_figures(options.json, rows)


if __name__ == "__main__":
    main()
