"""A progress bar in tokens, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text


class _TokenRate(ProgressColumn):
    """Tokens per second so far."""

    def render(self, task: Task) -> Text:
        speed = task.completed / task.elapsed if task.elapsed else 0.0
        return Text(f"{speed:,.0f} tokens/s")


@contextmanager
def token_progress(title: str, num_tokens: int) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs.

    Yields
    ------
    callable
        To be told how many more tokens are done.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), _TokenRate(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=num_tokens)
        yield lambda num_done: progress.advance(task, num_done)
