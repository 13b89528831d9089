"""What ``offload demo`` found: the numbers, and how they are shown."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from offload.config import format_size
from offload.demo import Session
from offload.report import movement_rows, pairs_table, share_on, stats_data, tier_table
from offload.stats import CacheStats

SLACK_BYTES: Final = 300 << 20
"""What a run may take besides tiers and weights: activations, and what torch keeps to itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class DemoReport:
    """What the demo found; ``--json`` prints its numbers.

    Attributes
    ----------
    offloaded : Session
    baseline : Session or None
        The same on ``DynamicCache``; None if it was not asked for.
    stats : CacheStats
        Of the offloaded cache, after the last question.
    kv_bytes : int
        Keys and values of the document.
    peak_growth_bytes, allowed_growth_bytes : int
        By how much the process grew at most on the offloaded run, and by how much it may: device
        and host capacities, the weights and 300 MiB.
    """

    offloaded: Session
    baseline: Session | None
    stats: CacheStats
    kv_bytes: int
    peak_growth_bytes: int
    allowed_growth_bytes: int

    @property
    def num_correct(self) -> int:
        """Right answers on the offloaded cache."""
        return sum(answer.is_correct for answer in self.offloaded.answers)

    @property
    def differing(self) -> list[str]:
        """Keys of the questions that the two caches answered with different tokens."""
        if self.baseline is None:
            return []
        pairs = zip(self.offloaded.answers, self.baseline.answers, strict=True)
        return [ours.fact.key for ours, theirs in pairs if ours.token_ids != theirs.token_ids]

    @property
    def has_passed(self) -> bool:
        """Whether all answers are right and no token differs."""
        return self.num_correct == len(self.offloaded.answers) and not self.differing


def report_data(report: DemoReport) -> dict[str, Any]:
    """Return the report as plain data, for JSON."""
    data = dataclasses.asdict(report)
    data["stats"] = stats_data(report.stats)
    return data | {
        "disk_share": share_on(report.stats, "disk"),
        "num_correct": report.num_correct,
        "identical": None if report.baseline is None else not report.differing,
        "passed": report.has_passed,
    }


def print_report(report: DemoReport, console: Console) -> None:
    """Print answers, tables and the verdict."""
    parts = (
        _answer_table(report),
        tier_table(report.stats),
        _speed_table(report),
        pairs_table(movement_rows(report.stats)),
    )
    for part in parts:
        console.print(part, "")
    for line in _verdict(report):
        console.print(line, highlight=False, soft_wrap=True)


def _answer_table(report: DemoReport) -> Table:
    table = Table("asked for", "hidden at token", "truth", "answer", "", show_edge=False)
    for answer in report.offloaded.answers:
        fact, mark = answer.fact, "right" if answer.is_correct else "wrong"
        table.add_row(fact.key, str(fact.position), fact.answer, Text(answer.text), mark)
    return table


def _speed_table(report: DemoReport) -> Table:
    table = Table("cache", show_edge=False)
    for name in ("reading", "answering", "seconds", "KV in memory"):
        table.add_column(name, justify="right")
    in_memory = sum(report.stats.tiers[tier].peak_bytes for tier in ("gpu", "cpu"))
    rows = [("OffloadedCache", report.offloaded, in_memory)]
    if report.baseline is not None:
        rows.append(("DynamicCache", report.baseline, report.kv_bytes))
    for name, session, num_bytes in rows:
        table.add_row(
            name,
            f"{session.read_tokens / session.read_s:,.0f} tokens/s",
            f"{session.answer_tokens / session.answer_s:,.1f} tokens/s",
            f"{session.read_s + session.answer_s:.1f}",
            format_size(num_bytes),
        )
    return table


def _verdict(report: DemoReport) -> Iterator[str]:
    num_tokens, answers = report.offloaded.read_tokens, report.offloaded.answers
    share = share_on(report.stats, "disk")
    yield f"KV cache of {num_tokens} tokens: {format_size(report.kv_bytes)}, {share:.0%} on disk"
    yield (
        f"peak memory: {format_size(report.peak_growth_bytes)} over the start, allowed "
        f"{format_size(report.allowed_growth_bytes)} (tiers, weights and "
        f"{format_size(SLACK_BYTES)})"
    )
    yield f"answers: {report.num_correct} of {len(answers)} right"
    if report.baseline is not None:
        differing = ", ".join(report.differing)
        yield f"tokens: {f'differ for {differing}' if differing else 'identical'}"
