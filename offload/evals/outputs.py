"""Where the results of ``offload eval`` go: the screen, a JSON file, a report with plots."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from offload.cli_options import positive_int
from offload.errors import ConfigError
from offload.evals.fidelity import FidelityRow
from offload.evals.report import origin, write_report
from offload.evals.sheets import Figure, Sheet
from offload.evals.tasks import TaskRow

_TABLE_WIDTH = 200


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that both kinds of evaluation share."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    text = "write report.md and its plots into this folder"
    parser.add_argument("--report", type=Path, metavar="DIR", help=text)
    text = "threads of torch (default: its own)"
    parser.add_argument("--threads", type=positive_int, metavar="N", help=text)


def check_outputs(args: argparse.Namespace) -> None:
    """Make the folders of the outputs, before any work is done.

    Raises
    ------
    ConfigError
        They cannot be made, or the JSON file cannot be written.
    """
    try:
        if args.report is not None:
            args.report.mkdir(parents=True, exist_ok=True)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.open("a").close()
    except OSError as error:
        raise ConfigError(f"the results cannot be written: {error}") from error


def publish(
    args: argparse.Namespace,
    title: str,
    notes: Sequence[str],
    rows: Sequence[FidelityRow] | Sequence[TaskRow],
    sheets: Sequence[Sheet],
    figures: Iterable[Figure],
) -> None:
    """Print the tables, and write what else was asked for.

    Parameters
    ----------
    args : argparse.Namespace
        Has the options of ``add_outputs``.
    title : str
    notes : sequence of str
        What a reader must know to understand the numbers.
    rows, sheets, figures
    """
    console = Console()
    # Numbers cut short would be worse than lines that a narrow terminal wraps.
    wide = Console(width=max(console.width, _TABLE_WIDTH))
    for sheet in sheets:
        wide.print(_table(sheet), "")
    for note in notes:
        console.print(note, style="dim", markup=False, highlight=False)
    made_by = origin(sys.argv[1:])
    if args.json is not None:
        data = {
            "origin": asdict(made_by),
            "notes": list(notes),
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    if args.report is not None:
        page = write_report(args.report, title, made_by, notes, sheets, figures)
        console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


def _table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left", show_edge=False, header_style="bold")
    for number, name in enumerate(sheet.columns):
        is_name = number < sheet.num_names
        table.add_column(name, justify="left" if is_name else "right", no_wrap=True)
    firsts = [cells[0] for cells in sheet.rows]
    for cells, following in zip(sheet.rows, [*firsts[1:], firsts[-1]], strict=True):
        is_repeated = len(set(firsts)) < len(firsts)
        table.add_row(*cells, end_section=is_repeated and cells[0] != following)
    return table
