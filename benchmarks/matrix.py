"""Token identity with DynamicCache: the acceptance matrix, counted and written down.

    python -m benchmarks.matrix [--full] [--jobs 2] [--architectures llama gemma3] [--output DIR]

Runs every architecture with every mode through three tiers that are far too small, and compares
tokens and logits with DynamicCache. By default each pair runs once, the attention implementations
taking turns; ``--full`` runs every attention implementation and every chunk size, with and without
telling the cache the model's config. Writes ``matrix.md`` and ``matrix.json``.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers

from tests.support.cells import (
    CHUNK_TOKENS,
    TIERS,
    Cell,
    all_cells,
    compare,
    covering_cells,
    expected_outcome,
    refused_by_transformers,
    run_offloaded,
    used_tiers,
)
from tests.support.generation import Outcome
from tests.support.models import ARCHITECTURES
from tests.support.modes import MODES

_MAX_LOGIT_ERROR = 1e-4
_RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class CellResult:
    """How one cell ended.

    Attributes
    ----------
    cell : Cell
    outcome : {"same", "different", "failed"}
        Failed: OffloadedCache raised where DynamicCache did not.
    detail : str
        What is different, or the error.
    logit_error : float
        Largest absolute difference of any logit.
    margin : float
        Smallest lead of a best logit over the second best: what an error must reach to show.
    tiers : list of str
        Those that stored chunks.
    seconds : float
        Of the run with OffloadedCache.
    """

    cell: Cell
    outcome: str
    detail: str
    logit_error: float
    margin: float
    tiers: list[str]
    seconds: float


def smallest_margin(outcome: Outcome) -> float:
    """Return the smallest lead of a best logit over the second best, where a token was chosen."""
    chosen = [step if step.dim() == 2 else step[:, -1] for step in outcome.logits]
    return float(min(step.topk(2).values.diff().abs().min() for step in chosen))


def run_cell(cell: Cell, folder: Path) -> CellResult:
    """Run and compare one cell."""
    expected = expected_outcome(cell.architecture, cell.attention, cell.mode)
    margin, start = smallest_margin(expected), time.perf_counter()
    try:
        found, stats = run_offloaded(cell, folder)
    except Exception as error:  # any failure is a result, and the other cells go on
        detail = f"{type(error).__name__}: {error}"
        return CellResult(cell, "failed", detail, 0.0, margin, [], time.perf_counter() - start)
    seconds = time.perf_counter() - start
    comparison, tiers = compare(expected, found), sorted(used_tiers(stats))
    problems = []
    if not comparison.same_tokens:
        problems.append("tokens differ")
    if comparison.logit_error > _MAX_LOGIT_ERROR:
        problems.append(f"logits differ by {comparison.logit_error:.1e}")
    if ARCHITECTURES[cell.architecture].offloads and set(tiers) != set(TIERS):
        problems.append(f"used only {tiers}")
    return CellResult(
        cell,
        "different" if problems else "same",
        "; ".join(problems),
        comparison.logit_error,
        margin,
        tiers,
        seconds,
    )


def run_cells(cells: list[Cell]) -> list[CellResult]:
    """Run cells one after the other, on one thread."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        return [run_cell(cell, Path(folder)) for cell in cells]


def choose_cells(names: list[str], *, full: bool) -> list[list[Cell]]:
    """Return the cells of the named architectures, one list per architecture."""
    cells = list(covering_cells())
    if full:
        variants = itertools.product(all_cells(), CHUNK_TOKENS, (False, True))
        cells = [
            replace(cell, chunk_tokens=size, with_config=told) for cell, size, told in variants
        ]
    chosen: dict[str, list[Cell]] = {name: [] for name in names}
    for cell in cells:
        if cell.architecture in chosen:
            chosen[cell.architecture].append(cell)
    return list(chosen.values())


def count_refused(names: list[str]) -> int:
    """Return how many (architecture, attention, mode) transformers itself refuses."""
    triples = itertools.product(names, ("sdpa", "eager"), MODES)
    return sum(refused_by_transformers(*triple) for triple in triples)


def write_markdown(results: list[CellResult], refused: int, path: Path) -> None:
    """Write one row per architecture, and what went wrong."""
    counts = Counter(result.outcome for result in results)
    lines = [
        "# Token identity with DynamicCache",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, float32, CPU. "
        f"{len(results)} comparisons: {counts['same']} the same, {counts['different']} different, "
        f"{counts['failed']} failed. {refused} combinations of architecture, attention and mode "
        "are refused by transformers itself and not compared.",
        "",
        "| architecture | same | different | failed | largest logit error | smallest margin | s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, group in itertools.groupby(results, key=lambda result: result.cell.architecture):
        rows = list(group)
        found = Counter(row.outcome for row in rows)
        lines.append(
            f"| {name} | {found['same']} | {found['different']} | {found['failed']} "
            f"| {max(row.logit_error for row in rows):.1e} | {min(row.margin for row in rows):.1e} "
            f"| {sum(row.seconds for row in rows):.1f} |"
        )
    wrong = [result for result in results if result.outcome != "same"]
    lines += ["", *(f"* `{result.cell}`: {result.detail}" for result in wrong)]
    path.write_text("\n".join(lines).rstrip() + "\n")


def main() -> int:
    """Run the matrix and return 1 if a cell is not the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="every variant of every cell")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--output", type=Path, default=_RESULTS)
    arguments = parser.parse_args()
    work = choose_cells(arguments.architectures, full=arguments.full)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        results = [result for group in pool.map(run_cells, work) for result in group]
    arguments.output.mkdir(parents=True, exist_ok=True)
    refused = count_refused(arguments.architectures)
    write_markdown(results, refused, arguments.output / "matrix.md")
    report = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "refused_by_transformers": refused,
        "cells": [asdict(result) for result in results],
    }
    (arguments.output / "matrix.json").write_text(json.dumps(report, indent=1) + "\n")
    counts = Counter(result.outcome for result in results)
    print(f"{len(results)} comparisons: {dict(counts)}; see {arguments.output / 'matrix.md'}")
    return 0 if counts["same"] == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
