"""Progress bars on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    """What was done per second so far."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.completed / task.elapsed if task.elapsed else 0.0
        return Text(f"{speed:,.0f} {self._unit}/s")


@contextmanager
def token_progress(title: str, num_tokens: int) -> Iterator[Callable[[int], None]]:
    """Show a bar in tokens while the block runs.

    Yields
    ------
    callable
        To be told how many more tokens are done.
    """
    columns = (_title(), BarColumn(), _Rate("tokens"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=num_tokens)
        yield lambda num_done: progress.advance(task, num_done)


@contextmanager
def count_progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of something whose number is not known beforehand, while the block runs.

    Parameters
    ----------
    title : str
    unit : str
        What is counted, in the plural.

    Yields
    ------
    callable
        To be told how many are done, and how many there are in all.
    """
    columns = (_title(), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None)
        yield lambda num_done, total: progress.update(task, completed=num_done, total=total)
        if progress.tasks[task].total is None:
            progress.update(task, total=0)  # there was nothing to do


def _title() -> TextColumn:
    return TextColumn("{task.description}", markup=False)
