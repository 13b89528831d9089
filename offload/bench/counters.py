"""What a cache says that it did, as numbers of which differences make sense."""

from collections.abc import Mapping

from offload import OffloadedCache
from offload.report import stats_data

Counts = dict[str, float]


def read_counts(cache: object) -> Counts:
    """Return the counters of a cache so far, by name; none for caches that do not count."""
    if not isinstance(cache, OffloadedCache):
        return {}
    data = stats_data(cache.stats())
    counts = {
        f"{tier}.{name}": float(of_tier[name])
        for tier, of_tier in data["tiers"].items()
        for name in ("loaded_bytes", "stored_bytes")
    }
    groups = (("", data), ("rows.", data.get("rows", {})), ("near.", data.get("near") or {}))
    for prefix, group in groups:
        numbers = {k: v for k, v in group.items() if isinstance(v, int | float)}
        counts |= {f"{prefix}{name}": float(value) for name, value in numbers.items()}
    return counts


def between(before: Mapping[str, float], after: Mapping[str, float]) -> Counts:
    """Return by how much each counter has grown."""
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def add(total: Mapping[str, float], more: Mapping[str, float]) -> Counts:
    """Return the sums of counters."""
    return {name: total.get(name, 0.0) + more.get(name, 0.0) for name in {*total, *more}}


def hit_rate(counts: Mapping[str, float]) -> float | None:
    """Return the share of rows in no tier's memory that a cache of lines had; None if unknown."""
    lookups = counts.get("rows.line_lookups", 0.0)
    return counts["rows.line_hits"] / lookups if lookups else None


def hidden_share(counts: Mapping[str, float]) -> float | None:
    """Return the share of the time spent reading from disk in which the model did not wait."""
    read_s = counts.get("rows.read_s", 0.0)
    return max(0.0, 1 - counts["rows.wait_s"] / read_s) if read_s > 0 else None
