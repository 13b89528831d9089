"""What an error target reads, and whether it is kept, on parametric heads.

Each head is asked by `adaptive` with `error=` one query after the other, the budget at a tenth; one
query in eight is compared with full attention and steers, as the runtime's self-check does with one
call in 256. Shown are the second half of the queries: what was read besides sinks and window, as a
share of all tokens, and the error of the output relative to its length.

    python -m benchmarks.error_target [--num-keys 16384] [--targets 0.02 0.05 0.1] [--json FILE]
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from offload.evals.parametric import FLAT, MEDIUM, SHARP, Shape, make_head
from offload.index.residual import ResidualIndex
from offload.kernels.reference import merge
from offload.sparse.steering import ErrorSteering
from offload.types import Partial

_MOST = 0.1
_CHECK_EVERY = 8
_SINKS, _WINDOW = 4, 64


@dataclass(frozen=True)
class Row:
    """One target on one head."""

    num_keys: int
    temperature: float
    target: float
    read_median: float
    read_p95: float
    error_median: float
    error_p90: float
    missed: float
    factor: float


def measure(num_keys: int, temperature: float, target: float, num_queries: int) -> Row:
    """Ask one head all its queries."""
    head = make_head(Shape(num_keys, num_queries=num_queries, temperature=temperature))
    keys, values = (rows.bfloat16()[None] for rows in (head.keys, head.values))
    middle = slice(_SINKS, num_keys - _WINDOW)
    index = ResidualIndex.build(keys[:, middle], values[:, middle])
    logits = head.queries @ keys[0].float().mT / keys.shape[-1] ** 0.5
    wanted = logits.softmax(-1) @ values[0].float()
    steering, shares, errors = ErrorSteering(), [], []
    for number, query in enumerate(tqdm(head.queries, leave=False)):
        scaled = (query / keys.shape[-1] ** 0.5).view(1, 1, -1)
        hits = index.search(scaled, int(_MOST * num_keys))
        expected = index.expected_errors(scaled, hits)[:, :-1]
        hits = hits.first((expected > target * steering.factor).sum(1))
        found = hits.ids[hits.found] + _SINKS
        kept = torch.ones(num_keys, dtype=torch.bool)
        kept[middle] = False
        kept[found] = True
        exact = Partial(
            (logits[number, kept].softmax(-1) @ values[0, kept].float()).view(1, 1, -1),
            logits[number, kept].logsumexp(-1).view(1, 1),
        )
        tail = index.tail(scaled, hits, hits.found, values[:, hits.ids[0].clamp_min(0) + _SINKS])
        assert tail is not None
        out = merge([exact, tail]).out[0, 0]
        errors.append(float((out - wanted[number]).norm() / wanted[number].norm()))
        shares.append(len(found) / num_keys)
        if number % _CHECK_EVERY == 0:
            steering.observe(errors[-1], target)
    half = len(errors) // 2
    read, error = torch.tensor(shares[half:]), torch.tensor(errors[half:])
    return Row(
        num_keys=num_keys,
        temperature=temperature,
        target=target,
        read_median=float(read.median()),
        read_p95=float(read.quantile(0.95)),
        error_median=float(error.median()),
        error_p90=float(error.quantile(0.9)),
        missed=float((error > target).float().mean()),
        factor=steering.factor,
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--num-keys", type=int, default=16384)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(sys.argv[1:])
    torch.set_num_threads(1)
    names = ("temperature", "target", "read", "p95", "error", "p90", "missed", "factor")
    table, rows = Table(*names), []
    for temperature in (FLAT, MEDIUM, SHARP):
        for target in options.targets:
            row = measure(options.num_keys, temperature, target, options.queries)
            rows.append(row)
            cells: list[Any] = [f"{temperature:g}", f"{target:g}"]
            cells += [f"{share:.2%}" for share in (row.read_median, row.read_p95)]
            cells += [f"{row.error_median:.3f}", f"{row.error_p90:.3f}", f"{row.missed:.0%}"]
            table.add_row(*cells, f"{row.factor:.2f}")
    Console().print(table)
    if options.json is not None:
        data = {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
