"""Check a whole root: every session file, every record, every byte that is accounted for."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from offload.errors import CorruptCatalog, CorruptChunk, StorageError
from offload.sessions.checking import (
    BadRecord,
    Expected,
    RecordChecker,
    Records,
    expected_records,
    is_damage,
)
from offload.sessions.cross_check import (
    difference,
    identities,
    is_listed,
    name_of,
    row_errors,
)
from offload.sessions.garbage import collect
from offload.sessions.paths import allocated_bytes, remove
from offload.sessions.quarantine import quarantine_records
from offload.sessions.repairing import restore_row, set_session_aside
from offload.sessions.root import Root
from offload.sessions.session_file import SessionFile, renamed
from offload.tiers.io_engine import IoEngine

if TYPE_CHECKING:
    from offload.tiers.record import RecordFormat

_THREADS = 4

Progress = Callable[[int, int], object]
"""Told chunks checked, and chunks in all."""


@dataclass(slots=True)
class FsckReport:
    """What a check found.

    Attributes
    ----------
    num_sessions, num_chunks : int
        Checked.
    num_bytes : int
        Read and compared with checksums.
    bad_records : list of BadRecord
        Those that were quarantined before say so.
    bad_sessions : dict of str to str
        Name to what is wrong with the session's own file.
    bad_rows : dict of str to str
        Identity to what is wrong with the session's row in the catalog; its file is good.
    restored : list of str
        Names of the sessions among these whose rows were made again.
    orphans : list of Path
        Files that the catalog does not know; none if it is damaged, and may have known them.
    catalog_errors : list of str
        What SQLite says of the catalog, and what else is wrong with it, ``bad_rows`` included.
    accounted_bytes, physical_bytes : int
        Of segments and session files: what the catalog counts, and what they take up.
    seconds : float
    is_repaired : bool
        Whether what was found was set aside.
    """

    num_sessions: int = 0
    num_chunks: int = 0
    num_bytes: int = 0
    bad_records: list[BadRecord] = field(default_factory=list)
    bad_sessions: dict[str, str] = field(default_factory=dict)
    bad_rows: dict[str, str] = field(default_factory=dict)
    restored: list[str] = field(default_factory=list)
    orphans: list[Path] = field(default_factory=list)
    catalog_errors: list[str] = field(default_factory=list)
    accounted_bytes: int = 0
    physical_bytes: int = 0
    seconds: float = 0.0
    is_repaired: bool = False

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not (self.bad_records or self.bad_sessions or self.orphans or self.catalog_errors)

    @property
    def new_records(self) -> list[BadRecord]:
        """Bad records that were not in quarantine before."""
        return [record for record in self.bad_records if not record.was_known]


def fsck(root: Root, *, repair: bool = False, progress: Progress | None = None) -> FsckReport:
    """Verify everything in a root; others may go on using it.

    Parameters
    ----------
    root : Root
    repair : bool
        Quarantine damaged records and session files, make damaged rows again from the files of
        their sessions, remove orphans. What is left of a damaged session is a prefix that its
        tokens still find.
    progress : callable, optional

    Raises
    ------
    CorruptCatalog
        The catalog cannot be read; ``rebuild`` can make a new one.
    """
    started, report = time.perf_counter(), FsckReport()
    # Before the catalog: what is published later is no orphan.
    found = list(root.paths.data_files())
    report.catalog_errors = [
        str(message)
        for (message,) in root.catalog.rows("PRAGMA integrity_check")
        if message != "ok"
    ]
    report.catalog_errors += row_errors(root)
    files = _session_files(root, report)
    check_sessions(root, files, report, progress or (lambda done, total: None))
    _account(root, found, report)
    if repair:
        _repair(root, report)
    report.catalog_errors += report.bad_rows.values()
    report.seconds = time.perf_counter() - started
    return report


def check_sessions(
    root: Root, files: Iterable[SessionFile], report: FsckReport, progress: Progress
) -> None:
    """Verify every record that sessions name, once, and note what is bad in the report.

    Of a session that is deleted meanwhile, nothing is.
    """
    expected: dict[tuple[str, RecordFormat], Records] = {}
    for file in files:
        size = file.layout.chunk_tokens
        found = expected_records(file.rows, file.segments, file.layers, size)
        for segment, records in found.items():
            fmt = root.format_of(file.layout, file.namespace.fingerprint)
            expected.setdefault((segment, fmt), {}).update(records)
    total = sum(map(len, expected.values()))

    def advance(count: int) -> None:
        report.num_chunks += count
        progress(report.num_chunks, total)

    engine = IoEngine(_THREADS, deadline_s=root.deadline_s)
    try:
        for (segment, fmt), records in sorted(expected.items(), key=lambda item: item[0][0]):
            checker = RecordChecker(root.paths.segment(segment), fmt, engine, root.deadline_s)
            todo: list[Expected] = sorted(records.items())
            report.bad_records += _still_needed(root, checker.check(todo, advance))
            report.num_bytes += len(todo) * fmt.record_bytes
    finally:
        engine.close()


def _still_needed(root: Root, found: Iterable[BadRecord]) -> Iterator[BadRecord]:
    """Yield the bad records that some session has, and say which were set aside before."""
    for record in found:
        rows = root.catalog.rows(
            "SELECT b.is_bad FROM segments s JOIN blocks b ON b.segment = s.id "
            "WHERE s.name = ? AND b.position = ? % s.num_positions",
            record.path.stem,
            record.index,
        )
        if any(is_bad for (is_bad,) in rows):
            yield replace(record, reason=f"already quarantined: {record.reason}", was_known=True)
        elif rows:
            yield record


def _session_files(root: Root, report: FsckReport) -> list[SessionFile]:
    """Return what the files of all sessions say, but for their tensors."""
    found, others = identities(root)
    report.catalog_errors += [f"a session has the identity {other!r}" for other in others]
    report.num_sessions += len(found)
    files = [_session_file(root, identity, report) for identity in found]
    return [file for file in files if file is not None]


def _session_file(root: Root, identity: str, report: FsckReport) -> SessionFile | None:
    """Return what the file of a session says, but for its tensors; None if it is bad or gone."""
    name, damage = identity, ""
    try:
        name = name_of(root, identity)
    except CorruptCatalog as error:
        damage = str(error)
    try:
        file = root.read_session(identity)
        if file.identity != identity:
            raise CorruptChunk(f"the file of session {identity} is that of {file.identity}")
    except StorageError as error:
        if not is_damage(error):
            raise
        if damage:
            # The identity may be what is wrong with the row: nothing says whose file is missing.
            report.catalog_errors.append(f"session {identity}: {damage}; {error}")
        elif is_listed(root, identity):  # else it was deleted meanwhile
            report.bad_sessions[name] = str(error)
        return None
    if damage:
        report.bad_rows[identity] = f"session {file.name!r}: {damage}"
    try:
        contradiction = difference(root, file)
    except CorruptCatalog as error:
        contradiction = str(error)
    if contradiction is not None and is_listed(root, identity):
        report.catalog_errors.append(f"session {file.name!r}: {contradiction}")
    return renamed(file, tensors={})


def _account(root: Root, found: list[Path], report: FsckReport) -> None:
    """Compare the files with the catalog."""
    known = {
        root.paths.segment(name)
        for table in ("segments", "reservations")
        for (name,) in root.catalog.rows(
            f"SELECT {'name' if table == 'segments' else 'segment'} FROM {table}"
        )
    }
    known |= {root.paths.session(identity) for identity in identities(root)[0]}
    for query in ("SELECT session FROM reservations", "SELECT id FROM garbage_sessions"):
        known |= {root.paths.session(identity) for (identity,) in root.catalog.rows(query)}
    under_way = {path.name for path in known}
    for path in found:
        is_known = path in known or path.name.removesuffix(".tmp") in under_way
        # A damaged catalog may have known it: that a rebuild finds out.
        if not (is_known or report.catalog_errors) and path.exists():
            report.orphans.append(path)
        report.physical_bytes += allocated_bytes(path)
    [[segments, files]] = root.catalog.rows(
        "SELECT (SELECT coalesce(sum(used_bytes), 0) FROM segments), "
        "(SELECT coalesce(sum(file_bytes), 0) FROM sessions)"
    )
    report.accounted_bytes = segments + files


def _repair(root: Root, report: FsckReport) -> None:
    quarantine_records(root.catalog, root.paths, report.new_records)
    for name in report.bad_sessions:
        set_session_aside(root, name)
    if not report.catalog_errors:
        restored = [restore_row(root, identity) for identity in report.bad_rows]
        report.restored = [name for name in restored if name is not None]
    for path in report.orphans:
        remove(path)
    collect(root.catalog, root.paths)
    report.is_repaired = True
