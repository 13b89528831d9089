"""What a benchmark shows: tables of speed and of bytes, and curves over the context."""

from collections.abc import Callable, Iterator, Sequence

from offload.bench.rows import BenchRow
from offload.config import format_size
from offload.evals.sheets import Figure, Sheet

X_LABEL = "tokens of context"
_UNKNOWN = "–"
_SPEED = (
    *("contender", "tokens/s", "ms median", "p95", "times as fast", "first ms", "limit ms"),
    *("of limit", "error", "note"),
)
_BYTES = (
    *("contender", "scanned", "read", "from host", "from disk", "hits", "prefetched"),
    *("hidden", "index", "peak RSS", "peak HBM", "fill s"),
)


def bench_sheets(rows: Sequence[BenchRow]) -> Iterator[Sheet]:
    """Yield two tables per cell."""
    for title, group in _cells(rows).items():
        yield Sheet(f"{title}: speed", _SPEED, tuple(map(_speed_cells, group)))
        yield Sheet(f"{title}: bytes per step", _BYTES, tuple(map(_byte_cells, group)))


def bench_figures(rows: Sequence[BenchRow]) -> Iterator[Figure]:
    """Yield time and fraction of the limit over the context; contexts of one setting together."""
    groups: dict[str, list[BenchRow]] = {}
    for row in rows:
        groups.setdefault(_setting(row), []).append(row)
    for number, (setting, group) in enumerate(groups.items()):
        for name, label, of_row in _CURVES:
            curves: dict[str, list[tuple[float, float]]] = {}
            for row in group:
                value = of_row(row)
                if value is not None:
                    curves.setdefault(row.contender, []).append((row.num_tokens, value))
            if curves:
                yield Figure(f"{name}_{number}", setting, label, curves, has_log_y=True)


_CURVES: tuple[tuple[str, str, Callable[[BenchRow], float | None]], ...] = (
    ("ms_per_step", "ms per step, median", lambda row: row.ms_median),
    ("limit_share", "least time that moving the bytes takes / time", lambda row: row.limit_share),
)


def _cells(rows: Sequence[BenchRow]) -> dict[str, list[BenchRow]]:
    cells: dict[str, list[BenchRow]] = {}
    for row in rows:
        title = f"{row.num_tokens} tokens, {_setting(row)}, {format_size(row.kv_bytes)}"
        cells.setdefault(title, []).append(row)
    return cells


def _setting(row: BenchRow) -> str:
    parts = [f"{row.level} of {row.model}", f"{row.num_layers} layer{'s' * (row.num_layers > 1)}"]
    if row.batch > 1:
        parts.append(f"batch {row.batch}")
    if row.ram_share is not None:
        parts.append(f"{row.ram_share:.0%} in host memory")
    return ", ".join(parts)


def _speed_cells(row: BenchRow) -> tuple[str, ...]:
    return (
        row.contender,
        f"{row.tokens_per_s:.1f}",
        f"{row.ms_median:.2f}",
        f"{row.ms_p95:.2f}",
        f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})",
        f"{row.first_ms:.0f}",
        _or_unknown(row.limit_ms, "{:.2f}"),
        _or_unknown(row.limit_share, "{:.0%}"),
        _or_unknown(row.error_median, "{:.4f}"),
        row.note,
    )


def _byte_cells(row: BenchRow) -> tuple[str, ...]:
    return (
        row.contender,
        *map(_size, (row.scanned_bytes, row.read_bytes, row.host_bytes, row.disk_bytes)),
        _or_unknown(row.hit_rate, "{:.0%}"),
        _or_unknown(row.prefetch_rate, "{:.0%}"),
        _or_unknown(row.hidden_share, "{:.0%}"),
        *map(_size, (row.index_bytes, row.rss_bytes, row.hbm_bytes)),
        f"{row.fill_s:.1f}",
    )


def _or_unknown(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else form.format(value)


def _size(num_bytes: float | None) -> str:
    return _UNKNOWN if num_bytes is None else format_size(round(num_bytes))
