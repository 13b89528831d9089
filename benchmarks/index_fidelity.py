"""How close each index comes to full attention, on parametric heads, at equal reads.

Every query is asked by itself. The first 4 and last 64 tokens are read exactly, and of the others,
which are indexed, as many as the budget says: a share of all tokens. Keys and values are in
bfloat16. `recall` is the share of the 100 best indexed keys that were read, `mass` that of the
softmax; `Z error` is that of its denominator, relative, and `error` that of the output, relative
to its length, both with what the index says about the tokens that were not read. `scanned` counts
the bytes of the index that a search reads, `index` all of its bytes, as a share of keys and values.
Times are of one CPU, for building the index, and for one search with its estimate.

    python -m benchmarks.index_fidelity [--num-keys 16384] [--temperatures 24 36 52]
        [--budgets 0.004 0.008 0.018 0.05] [--queries 32] [--json FILE] [--markdown FILE]
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from benchmarks.fidelity import Problem, ask
from benchmarks.parametric import FLAT, MEDIUM, SHARP, Shape, make_head
from offload.index.base import KeyIndex
from offload.index.bounds import BoundsIndex
from offload.index.clusters import ClusterIndex
from offload.index.mean import MeanIndex
from offload.index.residual import ResidualIndex
from offload.index.topk import TopKIndex

METHODS: dict[str, Callable[[Tensor, Tensor], KeyIndex]] = {
    "oracle, rest estimated": TopKIndex.build,
    "oracle, renormalised": partial(TopKIndex.build, renormalised=True),
    "adaptive (2 bits)": partial(ResidualIndex.build, num_bits=2),
    "adaptive (1 bit)": partial(ResidualIndex.build, num_bits=1),
    "retroinfer": ClusterIndex.build,
    "quest": BoundsIndex.build,
    "rekv": partial(MeanIndex.build, chunk_tokens=16),
    "rekv, cosine": partial(MeanIndex.build, chunk_tokens=16, is_cosine=True),
    "infllm": partial(MeanIndex.build, chunk_tokens=128, representatives=4),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one budget on one head; means over the queries unless it says otherwise."""

    temperature: float
    num_keys: int
    method: str
    budget: float
    recall: float
    mass: float
    mass_error: float
    error_median: float
    error_p95: float
    bytes_per_key: float
    index_share: float
    scanned_share: float
    build_ms: float
    search_ms: float


def measure(problem: Problem, temperature: float, method: str, budgets: list[float]) -> list[Row]:
    """Build one index and ask all queries at every budget."""
    middle = problem.keys[:, problem.indexed], problem.values[:, problem.indexed]
    METHODS[method](*(rows[:, :64] for rows in middle))
    started = time.process_time()
    index = METHODS[method](*middle)
    build_s = time.process_time() - started
    rows = []
    for budget in budgets:
        answers = [ask(problem, index, n, budget) for n in range(problem.num_queries)]
        errors = torch.tensor([answer.error for answer in answers])
        rows.append(
            Row(
                temperature=temperature,
                num_keys=problem.num_keys,
                method=method,
                budget=budget,
                recall=_mean([answer.recall for answer in answers]),
                mass=_mean([answer.mass for answer in answers]),
                mass_error=_mean([answer.mass_error for answer in answers]),
                error_median=float(errors.quantile(0.5)),
                error_p95=float(errors.quantile(0.95)),
                bytes_per_key=index.num_bytes / index.num_tokens,
                index_share=index.num_bytes / problem.kv_bytes,
                scanned_share=_mean([a.scanned_bytes for a in answers]) / problem.kv_bytes,
                build_ms=1e3 * build_s,
                search_ms=median(answer.search_ms for answer in answers),
            )
        )
    return rows


def _mean(numbers: list[float] | list[int]) -> float:
    return sum(numbers) / len(numbers)


COLUMNS = (
    *("method", "read", "recall@100", "mass", "Z error", "error", "p95"),
    *("B/key", "index", "scanned", "build ms", "search ms"),
)


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text, by ``COLUMNS``."""
    return (
        row.method,
        f"{row.budget:.1%}",
        f"{row.recall:.2f}",
        f"{row.mass:.3f}",
        f"{row.mass_error:.3f}",
        f"{row.error_median:.3f}",
        f"{row.error_p95:.3f}",
        f"{row.bytes_per_key:.1f}",
        f"{row.index_share:.1%}",
        f"{row.scanned_share:.1%}",
        f"{row.build_ms:.0f}",
        f"{row.search_ms:.1f}",
    )


def title(row: Row) -> str:
    """Say which head a row is about."""
    return f"{row.num_keys} keys, temperature {row.temperature:g}"


def show(rows: list[Row]) -> None:
    """Print one table."""
    table = Table(*COLUMNS, title=title(rows[0]))
    for row in rows:
        table.add_row(*cells(row), end_section=row.budget == rows[-1].budget)
    Console().print(table)


def write_markdown(file: Path, tables: list[list[Row]]) -> None:
    """Write all tables, with what they were measured on."""
    lines = [f"{__doc__}".strip(), "", f"Measured with {machine()}.", ""]
    for rows in tables:
        lines += [f"## {title(rows[0])}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        lines += [*(_line(cells(row)) for row in rows), ""]
    file.write_text("\n".join(lines))


def _line(texts: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def machine() -> str:
    """Say what this runs on."""
    return f"torch {torch.__version__}, {torch.get_num_threads()} thread of {platform.machine()}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--num-keys", type=int, nargs="+", default=[16384])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[FLAT, MEDIUM, SHARP])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.004, 0.008, 0.018, 0.05])
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args(arguments)


def main() -> None:
    """Run the benchmark."""
    options = parse(sys.argv[1:])
    torch.set_num_threads(1)
    tables = []
    for num_keys in options.num_keys:
        for temperature in options.temperatures:
            shape = Shape(num_keys, num_queries=options.queries, temperature=temperature)
            head, rows = make_head(shape), []
            problem = Problem(head.keys, head.values, head.queries)
            for method in tqdm(options.methods, desc=f"{num_keys} {temperature:g}", leave=False):
                rows += measure(problem, temperature, method, options.budgets)
            show(rows)
            tables.append(rows)
    if options.json is not None:
        flat = [asdict(row) for rows in tables for row in rows]
        options.json.write_text(json.dumps({"machine": machine(), "rows": flat}, indent=1) + "\n")
    if options.markdown is not None:
        write_markdown(options.markdown, tables)


if __name__ == "__main__":
    main()
