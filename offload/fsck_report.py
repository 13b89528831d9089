"""What a check of a session store found: tables for people, plain data for programs."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table

from offload.config import format_size
from offload.report import pairs_table
from offload.sessions.checking import BadRecord
from offload.sessions.fsck import FsckReport
from offload.sessions.rebuild import RebuildReport

_MAX_LINES: Final = 20
"""Of each kind, for people; a lost disk may have a million."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A bad record.

    Attributes
    ----------
    record : BadRecord
    sessions : list of str
        That contain it, and cannot be opened without it.
    was_known : bool
        It was in quarantine before.
    """

    record: BadRecord
    sessions: list[str]
    was_known: bool


@dataclass(frozen=True, slots=True)
class RootCheck:
    """What ``offload fsck`` found in one root.

    Attributes
    ----------
    root : Path
    report : FsckReport
    findings : list of Finding
    damaged_sessions : list of str
        That contain a chunk in quarantine, old or new.
    rebuilt : RebuildReport or None
    """

    root: Path
    report: FsckReport
    findings: list[Finding] = field(default_factory=list)
    damaged_sessions: list[str] = field(default_factory=list)
    rebuilt: RebuildReport | None = None

    @property
    def new_findings(self) -> list[Finding]:
        """Bad records that were not in quarantine before."""
        return [finding for finding in self.findings if not finding.was_known]

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found but what is in quarantine already."""
        report, rebuilt = self.report, self.rebuilt
        has_lost = rebuilt is not None and bool(rebuilt.set_aside)
        rest = report.bad_sessions or report.orphans or report.catalog_errors
        return not (self.new_findings or rest or has_lost)


def check_report(check: RootCheck) -> Group:
    """Return the summary, what was found, and what was or can be done about it."""
    return Group(pairs_table(_rows(check)), *_details(check), "", *_advice(check))


def check_data(check: RootCheck) -> dict[str, Any]:
    """Return everything for JSON."""
    rebuilt = check.rebuilt
    findings = [
        _record_data(each.record) | {"sessions": each.sessions, "was_known": each.was_known}
        for each in check.findings
    ]
    return {
        "root": str(check.root),
        "is_clean": check.is_clean,
        **report_data(check.report),
        "bad_records": findings,
        "damaged_sessions": check.damaged_sessions,
        "rebuilt": None
        if rebuilt is None
        else dataclasses.asdict(rebuilt) | {"set_aside": _texts(rebuilt.set_aside)},
    }


def report_data(report: FsckReport) -> dict[str, Any]:
    """Return the attributes of a report for JSON."""
    return dataclasses.asdict(report) | {
        "bad_records": [_record_data(record) for record in report.bad_records],
        "orphans": [str(path) for path in report.orphans],
    }


def records_table(records: Sequence[BadRecord], sessions: Sequence[str] | None = None) -> Table:
    """Return one row per bad record, for as many as somebody reads.

    Parameters
    ----------
    records : sequence of BadRecord
    sessions : sequence of str, optional
        The names of the sessions that contain each.
    """
    titles = ("file", "record") if sessions is None else ("file", "record", "sessions")
    table = Table(*titles, "what is wrong", show_edge=False, header_style="bold")
    for number, record in enumerate(records[:_MAX_LINES]):
        names = [] if sessions is None else [sessions[number]]
        table.add_row(record.path.name, str(record.index), *names, record.reason)
    if len(records) > _MAX_LINES:
        table.add_row(_more(len(records)))
    return table


def verdict(report: FsckReport) -> str:
    """Say in a line what the check of a session found."""
    if report.bad_sessions:
        return f"damaged: {'; '.join(report.bad_sessions.values())}"
    num_bad = len(report.bad_records)
    return f"damaged, {num_bad} bad of {speed(report)}" if num_bad else f"good, {speed(report)}"


def speed(report: FsckReport) -> str:
    """Say how much was read, and how fast."""
    rate = report.num_bytes / report.seconds / 1e9 if report.seconds else 0.0
    return (
        f"{report.num_chunks:,} chunks, {format_size(report.num_bytes)} in "
        f"{report.seconds:.2f} s, {rate:.2f} GB/s"
    )


def _rows(check: RootCheck) -> Iterator[tuple[str, str]]:
    report, rebuilt = check.report, check.rebuilt
    yield "root", str(check.root)
    if rebuilt is not None:
        yield (
            "new catalog",
            f"{rebuilt.num_sessions} sessions, {rebuilt.num_chunks:,} chunks; "
            f"{rebuilt.num_removed} files removed, {len(rebuilt.set_aside)} session files set "
            f"aside; {rebuilt.seconds:.2f} s",
        )
    yield "checked", f"{report.num_sessions} sessions, {speed(report)}"
    known = len(check.findings) - len(check.new_findings)
    yield "bad records", f"{len(check.findings)}, {known} of them in quarantine before"
    yield "bad session files", str(len(report.bad_sessions))
    yield "files nobody knows", str(len(report.orphans))
    yield "catalog", "good" if not report.catalog_errors else "damaged"
    accounted, physical = map(format_size, (report.accounted_bytes, report.physical_bytes))
    yield "space", f"{accounted} by the catalog, {physical} on the device"
    if check.damaged_sessions:
        yield "damaged sessions", ", ".join(check.damaged_sessions)


def _details(check: RootCheck) -> Iterator[RenderableType]:
    report, rebuilt = check.report, check.rebuilt
    if check.findings:
        records = [finding.record for finding in check.findings]
        yield ""
        yield records_table(records, [", ".join(each.sessions) for each in check.findings])
    reasons = [f"catalog: {text}" for text in report.catalog_errors]
    reasons += [f"session {name!r}: {text}" for name, text in report.bad_sessions.items()]
    reasons += [f"nobody knows {path}" for path in report.orphans]
    if rebuilt is not None:
        reasons += [f"set aside: {text}" for text in rebuilt.set_aside.values()]
    if reasons:
        yield ""
        yield from reasons[:_MAX_LINES]
    if len(reasons) > _MAX_LINES:
        yield _more(len(reasons))


def _advice(check: RootCheck) -> Iterator[str]:
    report = check.report
    if check.is_clean:
        yield "clean"
    elif report.is_repaired:
        yield from _repairs(check)
    elif check.new_findings or report.bad_sessions or report.orphans:
        yield "--repair sets aside what is bad, and removes what nobody knows"
    if len(report.catalog_errors) > len(report.restored):
        yield "--rebuild makes a new catalog from the files"
    if check.damaged_sessions:
        yield (
            "damaged sessions cannot be opened; what lies before the damage is still found by its "
            "tokens; `offload sessions delete` removes them"
        )


def _repairs(check: RootCheck) -> list[str]:
    report = check.report
    counts = (
        ("records quarantined", len(check.new_findings)),
        ("sessions quarantined with their files", len(report.bad_sessions)),
        ("files removed", len(report.orphans)),
    )
    return [f"{what}: {count}" for what, count in counts if count]


def _record_data(record: BadRecord) -> dict[str, Any]:
    return {"file": str(record.path), "index": record.index, "reason": record.reason}


def _texts(mapping: Mapping[Path, str]) -> dict[str, str]:
    return {str(path): text for path, text in mapping.items()}


def _more(count: int) -> str:
    return f"… and {count - _MAX_LINES} more; --json shows all"
