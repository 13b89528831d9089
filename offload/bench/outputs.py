"""Where the results of a benchmark go: the screen, and a folder."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TextIO

from rich.console import Console
from rich.table import Table

from offload.bench.provenance import Provenance, read_provenance
from offload.bench.rows import BenchRow
from offload.bench.sheets import X_LABEL, bench_figures, bench_sheets
from offload.errors import ConfigError
from offload.evals.report import origin, write_report

ROWS: Final = "rows.jsonl"
_TABLE_WIDTH: Final = 160
NOTES: Final = (
    "Contenders take turns, a round of steps each; a step gives every row of the batch one token. "
    "`times as fast`: as the first contender; median over rounds, least and most in parentheses. "
    "`first`: the first step, which builds what a policy has to build.",
    "`scanned`: of indexes; `read`: keys and values that attention read, wherever they were; `from "
    "disk`: what crossed from there. `hits`: rows that no tier's memory had and a cache of lines "
    "had. `prefetched`: chunks under way before they were asked for. `hidden`: share of the time "
    "of reading from disk in which the model did not wait. Peaks: by how much memory grew while "
    "the contender was filled and made its first step. `–`: nobody counts it.",
    "`limit ms`: the bytes divided by the bandwidths below, all ways used at once; `of limit`: "
    "that as a share of the time, by the bandwidths of the same round, median over rounds. "
    "`error`: of attention outputs against attention in float32 (of logits against the first "
    "contender, for whole models), relative, median.",
)


def write_figures(path: Path | None, rows: Sequence[Any]) -> None:
    """Write the rows of a benchmark, dataclasses, with what made them; nothing without a path."""
    if path is not None:
        found = {
            **dataclasses.asdict(read_provenance()),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        path.write_text(json.dumps(found, indent=1) + "\n")


def open_rows(folder: Path) -> TextIO:
    """Make the folder of the outputs, and open the file of the rows, before any work is done.

    Raises
    ------
    ConfigError
        It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / ROWS).open("w")
    except OSError as error:
        raise ConfigError(f"the results cannot be written: {error}") from error


def json_line(name: str, row: BenchRow, made_by: Provenance) -> str:
    """Return a row as a line of JSON, with all that is needed to understand it alone."""
    data = {"name": name, **dataclasses.asdict(row), "made_by": dataclasses.asdict(made_by)}
    return json.dumps(data)


def write_page(
    name: str, rows: Sequence[BenchRow], made_by: Provenance, folder: Path, *, has_plots: bool
) -> Path:
    """Write the tables, and plots if they are wanted; return the page."""
    return write_report(
        folder,
        f"Benchmark {name}",
        origin(sys.argv[1:]),
        (*NOTES, _where(made_by), _speeds(rows)),
        bench_sheets(rows),
        bench_figures(rows) if has_plots else (),
        x_label=X_LABEL,
    )


def print_rows(rows: Sequence[BenchRow], page: Path) -> None:
    """Print the tables, and where they are."""
    console = Console()
    # Numbers cut short would be worse than lines that a narrow terminal wraps.
    wide = Console(width=max(console.width, _TABLE_WIDTH))
    for sheet in bench_sheets(rows):
        table = Table(title=sheet.title, title_justify="left", show_edge=False)
        for number, name in enumerate(sheet.columns):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for cells in sheet.rows:
            table.add_row(*cells)
        wide.print(table, "")
    console.print(_speeds(rows), style="dim", highlight=False)
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


def _where(made_by: Provenance) -> str:
    return (
        f"Commit {made_by.commit or 'unknown'}; {made_by.processor}, {made_by.num_cores} cores, "
        f"{made_by.num_threads} thread{'s' * (made_by.num_threads > 1)}, load "
        f"{made_by.load_average:.1f} at the start."
    )


def _speeds(rows: Sequence[BenchRow]) -> str:
    cells = []
    for first in {row.bandwidths: row for row in rows}.values():
        named = dataclasses.asdict(first.bandwidths)
        speeds = [f"{name} {value / 1e9:.1f} GB/s" for name, value in named.items() if value]
        cosine = f"cosine of successive queries {first.query_cosine:.2f}"
        cells.append(f"{first.num_tokens} tokens: {', '.join((*speeds, cosine))}")
    return f"Measured in between, medians. {'; '.join(cells)}."
