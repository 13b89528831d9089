"""Turn what was seen of the contenders into rows."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from offload.bench.counters import hidden_share, hit_rate
from offload.bench.dense import DenseCache
from offload.bench.drivers import Driver
from offload.bench.limits import Bandwidths, Moved, least_seconds, typical
from offload.bench.measure import Subject
from offload.bench.rows import BenchRow, Sample, percentile, ratios


def make_row(
    subject: Subject, first: Subject, driver: Driver, speeds: Sequence[Bandwidths]
) -> BenchRow:
    """Return the row of one contender, compared with the first one.

    Parameters
    ----------
    subject, first : Subject
    driver : Driver
    speeds : sequence of Bandwidths
        Of every round.
    """
    settings, cell, sample = driver.settings, driver.cell, subject.sample
    moved = bytes_moved(subject, driver)
    bandwidths = typical(speeds)
    least_s = least_seconds(moved, bandwidths)
    return BenchRow(
        level=settings.level,
        model=settings.model,
        contender=subject.entry.name,
        num_layers=settings.num_layers,
        num_tokens=cell.num_tokens,
        batch=cell.batch,
        num_steps=sample.num_steps,
        num_rounds=len(sample.rounds),
        ram_share=cell.ram_share,
        kv_bytes=settings.kv_bytes(cell),
        **timings(sample, first.sample, cell.batch),
        scanned_bytes=moved.scanned,
        read_bytes=moved.read,
        host_bytes=moved.host,
        disk_bytes=moved.disk,
        bus_bytes=_over_bus(sample.counts, sample.num_steps),
        hit_rate=hit_rate(sample.counts),
        prefetch_rate=sample.prefetch_rate,
        hidden_share=hidden_share(sample.counts),
        rss_bytes=sample.rss_bytes,
        index_bytes=sample.index_bytes,
        hbm_bytes=sample.hbm_bytes,
        error_median=statistics.median(sample.errors) if sample.errors else None,
        limit_ms=None if least_s is None else 1e3 * least_s,
        limit_share=limit_share(sample, moved, speeds),
        bandwidths=bandwidths,
        query_cosine=driver.context.query_cosine,
        note=subject.cache.form if isinstance(subject.cache, DenseCache) else "",
    )


def timings(sample: Sample, first: Sample, batch: int) -> dict[str, Any]:
    """Return the fields of a row that are about time."""
    steps = [seconds for times in sample.rounds for seconds in times]
    by_round = ratios(sample, first)
    return {
        "tokens_per_s": batch * len(steps) / sum(steps),
        "ms_median": 1e3 * statistics.median(steps),
        "ms_p95": 1e3 * percentile(steps, 0.95),
        "first_ms": 1e3 * sample.first_s,
        "fill_s": sample.fill_s,
        "ratio": statistics.median(by_round),
        "ratio_low": min(by_round),
        "ratio_high": max(by_round),
    }


def limit_share(sample: Sample, moved: Moved, speeds: Sequence[Bandwidths]) -> float | None:
    """Return what share of its time a step had to take: median over rounds, each by itself."""
    shares = []
    for times, speed in zip(sample.rounds, speeds, strict=True):
        least_s = least_seconds(moved, speed)
        if least_s is None:
            return None
        shares.append(least_s / statistics.median(times))
    return statistics.median(shares)


def bytes_moved(subject: Subject, driver: Driver) -> Moved:
    """Return what a step had to move, as far as it is counted."""
    settings, cell = driver.settings, driver.cell
    entry, counts, steps = subject.entry, subject.sample.counts, subject.sample.num_steps
    # The context grows while it is measured.
    mean_tokens = cell.num_tokens + settings.num_steps // 2
    per_token = settings.shape.token_bytes(settings.torch_dtype)
    everything = settings.num_layers * cell.batch * mean_tokens * per_token
    skipped = counts.get("covered_tokens", 0.0) - counts.get("retrieved_tokens", 0.0)
    scanned = counts.get("scanned_bytes") if entry.has_index else 0.0
    host = None
    if driver.device.type == "cuda":
        loaded = counts.get("cpu.loaded_bytes", 0.0) / steps
        host = float(everything) if entry.name == "offloading" else loaded
    return Moved(
        scanned=None if scanned is None else scanned / steps,
        read=everything - skipped * settings.shape.row_bytes(settings.torch_dtype) / steps,
        weights=driver.weight_bytes,
        host=host,
        disk=_from_disk(counts, steps),
    )


def _from_disk(counts: Mapping[str, float], steps: int) -> float | None:
    if "disk.loaded_bytes" not in counts:
        return None
    return (counts["disk.loaded_bytes"] + counts.get("near.read_bytes", 0.0)) / steps


def _over_bus(counts: Mapping[str, float], steps: int) -> float | None:
    if "near.asked_bytes" not in counts:
        return None
    crossed = ("asked", "answered", "written", "fetched")
    return sum(counts[f"near.{name}_bytes"] for name in crossed) / steps
