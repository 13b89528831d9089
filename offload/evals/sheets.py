"""What an evaluation shows: tables and figures, of fidelity and of tasks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from offload.evals.fidelity import FidelityRow, by_class
from offload.evals.tasks import TaskRow

_Row = TypeVar("_Row")
_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table of text; the first columns are names, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int = 1


@dataclass(frozen=True, slots=True)
class Figure:
    """Curves over what is read.

    Attributes
    ----------
    name : str
        Of its file.
    title, y_label : str
    curves : dict of str to list of (float, float)
        By name: shares of tokens read, and what comes of it.
    has_log_y : bool
    """

    name: str
    title: str
    y_label: str
    curves: dict[str, list[tuple[float, float]]]
    has_log_y: bool = False


_FIDELITY_COLUMNS = (
    *("method", "read", "recall@100", "mass", "mass error", "error", "p95"),
    *("B/key", "index", "scanned", "fetched", "build ms", "search ms"),
)
_TASK_COLUMNS = (
    *("task", "policy", "n", "right", "exact", "points", "same", "KL", "read", "tokens read"),
    *("error", "p95", "read s", "answer s"),
)


def fidelity_sheets(rows: Sequence[FidelityRow]) -> Iterator[Sheet]:
    """Yield one table per length and class of heads."""
    for (num_keys, name), group in _groups(
        by_class(rows), lambda row: (row.num_keys, row.head_class)
    ):
        title = f"{num_keys} keys, {name} heads ({group[0].head})"
        yield Sheet(title, _FIDELITY_COLUMNS, tuple(map(_fidelity_cells, group)))


def fidelity_figures(rows: Sequence[FidelityRow]) -> Iterator[Figure]:
    """Yield the error against what is read, one figure per length and class of heads."""
    for (num_keys, name), group in _groups(
        by_class(rows), lambda row: (row.num_keys, row.head_class)
    ):
        for what, label in (("error_median", "median"), ("error_p95", "95th percentile")):
            curves: dict[str, list[tuple[float, float]]] = {}
            for row in group:
                curves.setdefault(row.method, []).append((row.fetched_share, getattr(row, what)))
            yield Figure(
                name=f"{what}_{num_keys}_{name}",
                title=f"{num_keys} keys, {name} heads",
                y_label=f"relative error of the output, {label}",
                curves=curves,
                has_log_y=True,
            )


def task_sheets(rows: Sequence[TaskRow]) -> Iterator[Sheet]:
    """Yield one table of all tasks, and one of means over them, per length."""
    for num_tokens, group in _groups(rows, lambda row: row.num_tokens):
        title = f"{num_tokens} tokens"
        means = [_mean_cells(*pair) for pair in _groups(group, lambda row: row.policy)]
        yield Sheet(f"{title}, means over tasks", _MEAN_COLUMNS, tuple(means))
        yield Sheet(title, _TASK_COLUMNS, tuple(map(_task_cells, group)), num_names=2)


def task_figures(rows: Sequence[TaskRow]) -> Iterator[Figure]:
    """Yield accuracy and divergence against what is read, per length; means over tasks."""
    for num_tokens, group in _groups(rows, lambda row: row.num_tokens):
        for what, label, has_log_y in (
            ("accuracy", "accuracy", False),
            ("divergence", "divergence from exact attention, nats", False),
        ):
            curves: dict[str, list[tuple[float, float]]] = {}
            for policy, own in _groups(group, lambda row: row.policy):
                point = (fmean(row.share_read for row in own), fmean(getattr(r, what) for r in own))
                curves.setdefault(policy.partition(":")[0], []).append(point)
            yield Figure(
                name=f"{what}_{num_tokens}",
                title=f"{num_tokens} tokens, mean over tasks",
                y_label=label,
                curves=curves,
                has_log_y=has_log_y,
            )


_MEAN_COLUMNS = ("policy", "tasks", "right", "exact", "points", "same", "KL", "read", "tokens read")


def _fidelity_cells(row: FidelityRow) -> tuple[str, ...]:
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
        f"{row.fetched_share:.1%}",
        f"{row.build_ms:.0f}",
        f"{row.search_ms:.1f}",
    )


def _task_cells(row: TaskRow) -> tuple[str, ...]:
    return (
        row.task,
        row.policy,
        str(row.num_answers),
        f"{row.accuracy:.1%}",
        f"{row.exact_accuracy:.1%}",
        f"{row.points:+.1f}",
        f"{row.agreement:.0%}",
        f"{row.divergence:.4f}",
        f"{row.share_read:.2%}",
        f"{row.tokens_read:.0f}",
        *((f"{row.error_median:.3f}", f"{row.error_p95:.3f}") if row.num_checks else ("–", "–")),
        f"{row.prefill_s:.1f}",
        f"{row.answer_s:.1f}",
    )


def _mean_cells(policy: str, rows: Sequence[TaskRow]) -> tuple[str, ...]:
    return (
        policy,
        str(len(rows)),
        f"{fmean(row.accuracy for row in rows):.1%}",
        f"{fmean(row.exact_accuracy for row in rows):.1%}",
        f"{fmean(row.points for row in rows):+.1f}",
        f"{fmean(row.agreement for row in rows):.0%}",
        f"{fmean(row.divergence for row in rows):.4f}",
        f"{fmean(row.share_read for row in rows):.2%}",
        f"{fmean(row.tokens_read for row in rows):.0f}",
    )


def _groups(rows: Iterable[_Row], key: Callable[[_Row], _Key]) -> Iterable[tuple[_Key, list[_Row]]]:
    groups: dict[_Key, list[_Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups.items()
