"""Write what an evaluation found: a page of Markdown with tables and plots."""

import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from offload import __version__
from offload.evals import plots
from offload.evals.sheets import Figure, Sheet

REPORT = "report.md"


@dataclass(frozen=True, slots=True)
class Origin:
    """What made some numbers, and where.

    Attributes
    ----------
    command, date, machine : str
    """

    command: str
    date: str
    machine: str


def origin(arguments: Sequence[str]) -> Origin:
    """Describe this run, by the arguments of the program."""
    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return Origin(
        command=shlex.join(["offload", *arguments]),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        machine=f"{device}, {threads} thread{'s' * (threads > 1)}, {versions}, "
        f"kv-offload {__version__}",
    )


def write_report(
    directory: Path,
    title: str,
    made_by: Origin,
    notes: Sequence[str],
    sheets: Iterable[Sheet],
    figures: Iterable[Figure],
    *,
    x_label: str = plots.SHARE_READ,
) -> Path:
    """Write ``report.md`` and its plots, which it leaves out where matplotlib is missing.

    Parameters
    ----------
    directory : Path
        Exists.
    title : str
    made_by : Origin
    notes : sequence of str
        What a reader must know to understand the numbers.
    sheets, figures
    x_label : str
        What the figures are over.

    Returns
    -------
    Path
        Of the page.
    """
    lines = [f"# {title}", "", f"    {made_by.command}", ""]
    lines += [f"{made_by.date}; {made_by.machine}.", ""]
    for note in notes:
        lines += [note, ""]
    lines += _pictures(directory, list(figures), x_label)
    for sheet in sheets:
        lines += [f"## {sheet.title}", "", *_markdown(sheet), ""]
    page = directory / REPORT
    page.write_text("\n".join(lines).rstrip() + "\n")
    return page


def _pictures(directory: Path, figures: Sequence[Figure], x_label: str) -> list[str]:
    if not figures:
        return []
    if not plots.can_draw():
        return [f"There are no plots: matplotlib is not installed (`{plots.INSTALL}`).", ""]
    lines = ["## Plots", ""]
    for figure in figures:
        caption = f"{figure.y_label} against {x_label}: {figure.title}"
        lines += [f"![{caption}]({plots.draw(figure, directory, x_label)})", ""]
    return lines


def _markdown(sheet: Sheet) -> list[str]:
    rules = ["---"] * sheet.num_names + ["---:"] * (len(sheet.columns) - sheet.num_names)
    return [f"| {' | '.join(cells)} |" for cells in (sheet.columns, rules, *sheet.rows)]
