"""Check a whole root: every session file, every record, every byte that is accounted for."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from offload.errors import CorruptCatalog, StorageError
from offload.sessions.checking import (
    BadRecord,
    Expected,
    RecordChecker,
    Records,
    expected_records,
)
from offload.sessions.garbage import collect, forget_session
from offload.sessions.paths import allocated_bytes, remove
from offload.sessions.quarantine import quarantine_file, quarantine_records
from offload.sessions.root import Root
from offload.sessions.schema import check_row
from offload.sessions.session_file import SessionFile, read_session_file, renamed
from offload.tiers.io_engine import IoEngine
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
    bad_sessions : dict of str to str
        Name to what is wrong with the session's own file.
    orphans : list of Path
        Files that the catalog does not know.
    catalog_errors : list of str
        What SQLite says of the catalog.
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


def fsck(root: Root, *, repair: bool = False, progress: Progress | None = None) -> FsckReport:
    """Verify everything in a root; others may go on using it.

    Parameters
    ----------
    root : Root
    repair : bool
        Quarantine damaged records and session files, remove orphans. What is left of a damaged
        session is a prefix that its tokens still find.
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
    _check_rows(root, report)
    files = _session_files(root, report)
    check_sessions(root, files, report, progress or (lambda done, total: None))
    _account(root, found, report)
    if repair:
        _repair(root, report)
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
            fmt = RecordFormat(file.layout, file.namespace.fingerprint)
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
            bad = list(checker.check(todo, advance))
            report.bad_records += [record for record in bad if _is_needed(root, segment, record)]
            report.num_bytes += len(todo) * fmt.record_bytes
    finally:
        engine.close()


def _is_needed(root: Root, segment: str, record: BadRecord) -> bool:
    rows = root.catalog.rows(
        "SELECT 1 FROM segments s JOIN blocks b ON b.segment = s.id "
        "WHERE s.name = ? AND b.position = ? % s.num_positions",
        segment,
        record.index,
    )
    return bool(rows)


def _check_rows(root: Root, report: FsckReport) -> None:
    """Verify the checksums of rows, but for those of sessions, which are next."""
    for table, query in (
        ("meta", "SELECT * FROM meta"),
        (
            "segments",
            "SELECT name, namespace, num_layers, num_positions, record_bytes, used_bytes, checksum "
            "FROM segments",
        ),
    ):
        for row in root.catalog.rows(query):
            try:
                check_row(table, row[:-1], row[-1])
            except CorruptCatalog as error:
                report.catalog_errors.append(str(error))


def _session_files(root: Root, report: FsckReport) -> list[SessionFile]:
    """Return what the files of all sessions say, but for their tensors."""
    files = []
    for identity, name in root.catalog.rows("SELECT id, name FROM sessions"):
        report.num_sessions += 1
        try:
            root.find(name)  # verifies the row
            file = read_session_file(root.paths.session(identity))
            if file.identity != identity:
                raise CorruptCatalog(f"the file of session {identity} is that of {file.identity}")
            difference = _difference(root, file)
        except StorageError as error:
            if root.find(name) == identity:  # else it was deleted meanwhile
                report.bad_sessions[str(name)] = str(error)
        else:
            if difference is not None and root.find(name) == identity:
                report.catalog_errors.append(f"session {name!r}: {difference}")
            files.append(renamed(file, tensors={}))
    return files


def _difference(root: Root, file: SessionFile) -> str | None:
    """Say where the catalog and the file of a session disagree."""
    rows = root.catalog.rows(
        "SELECT s.name, b.position FROM session_blocks m JOIN blocks b ON b.id = m.block "
        "JOIN segments s ON s.id = b.segment WHERE m.session = ? ORDER BY m.number",
        file.identity,
    )
    expected = [(ref.segment, ref.position) for row in file.rows for ref in row]
    if rows == expected:
        return None
    pairs = enumerate(zip_longest(expected, rows))
    number, (want, got) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
    return f"chunk {number} lies at {want} by its file, at {got} by the catalog"


def _account(root: Root, found: list[Path], report: FsckReport) -> None:
    """Compare the files with the catalog."""
    known = {
        root.paths.segment(name)
        for table in ("segments", "reservations")
        for (name,) in root.catalog.rows(
            f"SELECT {'name' if table == 'segments' else 'segment'} FROM {table}"
        )
    }
    for query in (
        "SELECT id FROM sessions",
        "SELECT session FROM reservations",
        "SELECT id FROM garbage_sessions",
    ):
        known |= {root.paths.session(identity) for (identity,) in root.catalog.rows(query)}
    under_way = {path.name for path in known}
    for path in found:
        is_known = path in known or path.name.removesuffix(".tmp") in under_way
        if not is_known and path.exists():
            report.orphans.append(path)
        report.physical_bytes += allocated_bytes(path)
    [[segments, files]] = root.catalog.rows(
        "SELECT (SELECT coalesce(sum(used_bytes), 0) FROM segments), "
        "(SELECT coalesce(sum(file_bytes), 0) FROM sessions)"
    )
    report.accounted_bytes = segments + files


def _repair(root: Root, report: FsckReport) -> None:
    quarantine_records(root.catalog, root.paths, report.bad_records)
    for name in report.bad_sessions:
        with root.catalog.transaction() as db:
            row = db.execute("SELECT id FROM sessions WHERE name = ?", (name,)).fetchone()
            if row is not None:
                quarantine_file(root.paths, root.paths.session(row[0]))
                forget_session(db, row[0])
    for path in report.orphans:
        remove(path)
    collect(root.catalog, root.paths)
    report.is_repaired = True
