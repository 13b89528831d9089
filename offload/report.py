"""Statistics of a cache as tables for people and as plain data for programs."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from rich.console import Group
from rich.table import Table

from offload.config import format_size
from offload.stats import CacheStats


def stats_report(stats: CacheStats) -> Group:
    """Return the whole of the statistics: where the bytes are, and what moving them cost.

    Parameters
    ----------
    stats : CacheStats

    Returns
    -------
    Group
        For ``rich.console.Console.print``.
    """
    return Group(tier_table(stats), "", pairs_table(movement_rows(stats)))


def tier_table(stats: CacheStats) -> Table:
    """Return one row per tier: capacity, used, peak, chunks, and bytes read and written."""
    table = Table("tier", show_edge=False, header_style="bold")
    for name in ("capacity", "used", "peak", "chunks", "read", "written"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, tier in stats.tiers.items():
        table.add_row(
            name,
            format_size(tier.capacity_bytes),
            format_size(tier.used_bytes),
            format_size(tier.peak_bytes),
            str(tier.num_chunks),
            format_size(tier.loaded_bytes),
            format_size(tier.stored_bytes),
        )
    return table


def movement_rows(stats: CacheStats) -> list[tuple[str, str]]:
    """Return names and values of all that belongs to no single tier."""
    rows = [
        ("tokens", str(stats.num_tokens)),
        ("chunks", str(stats.num_chunks)),
        ("growing chunks", format_size(stats.tail_bytes)),
        ("staging", format_size(stats.staging_bytes)),
        ("waited for loads", f"{stats.load_wait_s:.2f} s"),
        ("waited for stores", f"{stats.store_wait_s:.2f} s"),
        ("prefetch hit rate", f"{stats.prefetch_hit_rate:.1%}"),
        ("promoted, demoted", f"{stats.promoted_chunks}, {stats.demoted_chunks} chunks"),
        ("failed, unneeded stores", f"{stats.failed_stores}, {stats.unneeded_failures}"),
        ("rescued from them", f"{stats.rescued_chunks} chunks"),
    ]
    if stats.failed_exchanges:
        rows.append(("failed exchanges", f"{stats.failed_exchanges} chunks"))
    if stats.covered_tokens:
        share = stats.retrieved_tokens / stats.covered_tokens
        errors = f"{stats.error_median:.2g}, {stats.error_p95:.2g}" if stats.num_checks else "–"
        rows += [
            ("read sparsely", f"{share:.2%} of what is indexed"),
            ("indexes", format_size(stats.index_bytes)),
            ("error: median, p95", f"{errors} ({stats.num_checks} checks)"),
        ]
    return rows


def pairs_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and values, without a header."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def stats_data(stats: CacheStats) -> dict[str, Any]:
    """Return the statistics as nested dicts of numbers, by the names of their attributes."""
    return dataclasses.asdict(stats)


def share_on(stats: CacheStats, tier: str) -> float:
    """Return the share of the cache's full chunks that a tier holds; 0 where there are none.

    Parameters
    ----------
    stats : CacheStats
    tier : str
        One of ``stats.tiers``.
    """
    return stats.tiers[tier].num_chunks / stats.num_chunks if stats.num_chunks else 0.0
