"""Make a new catalog from the files alone."""

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from offload.errors import OffloadError, StorageError
from offload.sessions import blocks
from offload.sessions.catalog import Catalog, get_meta, set_meta
from offload.sessions.garbage import collect, write_used_bytes
from offload.sessions.namespace import layout_text
from offload.sessions.owners import is_alive
from offload.sessions.paths import RootPaths, allocated_bytes, is_temporary, remove
from offload.sessions.quarantine import quarantine_file, quarantined_records
from offload.sessions.root import lock_root
from offload.sessions.saving import add_session
from offload.sessions.session_file import BlockRef, SessionFile, read_session_file
from offload.tiers.record import RecordFormat
from offload.types import round_up

_SETTINGS = ("quota_bytes", "min_free_bytes")


@dataclass(slots=True)
class RebuildReport:
    """What a rebuild found.

    Attributes
    ----------
    num_sessions, num_chunks : int
        In the new catalog.
    set_aside : dict of Path to str
        Session files that were moved to quarantine, and why.
    num_removed : int
        Files that no session needs.
    seconds : float
    """

    num_sessions: int = 0
    num_chunks: int = 0
    set_aside: dict[Path, str] = field(default_factory=dict)
    num_removed: int = 0
    seconds: float = 0.0


def rebuild(
    path: Path, *, progress: Callable[[int, int], object] = lambda done, total: None
) -> RebuildReport:
    """Replace the catalog of a root by one made from its session files.

    The old catalog goes to quarantine; its quota is kept if it can still be read. Records are not
    read: ``fsck`` does that.

    Parameters
    ----------
    path : Path
        The root.
    progress : callable
        Told session files read, and how many there are.

    Raises
    ------
    SessionInUse
        Somebody has the root open.
    """
    started, report = time.perf_counter(), RebuildReport()
    paths = RootPaths(Path(path).expanduser().absolute())
    paths.make()
    lock_fd = lock_root(paths, exclusive=True)
    try:
        settings = _old_settings(paths)
        _set_catalog_aside(paths)
        catalog = Catalog(paths.catalog, "relaxed")
        try:
            _fill(catalog, paths, _read_sessions(paths, report, progress), report)
            with catalog.transaction() as db:
                for key, value in settings.items():
                    set_meta(db, key, value)
            _remove_unneeded(catalog, paths, report)
            collect(catalog, paths)
        finally:
            catalog.close()
    finally:
        os.close(lock_fd)
    report.seconds = time.perf_counter() - started
    return report


def _old_settings(paths: RootPaths) -> dict[str, str]:
    settings: dict[str, str] = {}
    if not paths.catalog.exists():
        return settings
    with (
        contextlib.suppress(sqlite3.Error, OffloadError),
        contextlib.closing(sqlite3.connect(paths.catalog)) as db,
    ):
        for key in _SETTINGS:
            value = get_meta(db, key)
            if value is not None:
                settings[key] = value
    return settings


def _set_catalog_aside(paths: RootPaths) -> None:
    for end in ("", "-wal", "-shm"):
        quarantine_file(paths, paths.catalog.with_name(paths.catalog.name + end))


def _read_sessions(
    paths: RootPaths, report: RebuildReport, progress: Callable[[int, int], object]
) -> list[SessionFile]:
    """Return the newest good file of every name, oldest first."""
    found = [path for path in paths.data_files() if path.suffix == ".kvsession"]
    newest: dict[str, SessionFile] = {}
    for number, path in enumerate(found, 1):
        try:
            file = read_session_file(path)
            if path != paths.session(file.identity):
                raise StorageError(f"{path} says that it is session {file.identity}")
            _check_segments(paths, file)
        except StorageError as error:
            report.set_aside[path] = str(error)
            quarantine_file(paths, path)
        else:
            other = newest.get(file.name)
            if other is None or other.created_at < file.created_at:
                newest[file.name] = file
        progress(number, len(found))
    return sorted(newest.values(), key=lambda file: file.created_at)


def _check_segments(paths: RootPaths, file: SessionFile) -> None:
    size = RecordFormat(file.layout, b"").record_bytes
    for name, (num_layers, num_positions) in file.segments.items():
        path, expected = paths.segment(name), num_layers * num_positions * size
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise StorageError(
                f"session {file.name!r} needs {expected} bytes of segment {name}, which has {found}"
            )


def _fill(
    catalog: Catalog, paths: RootPaths, files: list[SessionFile], report: RebuildReport
) -> None:
    bad = set(quarantined_records(paths))
    with catalog.transaction() as db:
        segments: dict[str, int] = {}
        known: dict[BlockRef, int] = {}
        for file in files:
            namespace = file.namespace
            db.execute(
                "INSERT OR IGNORE INTO namespaces VALUES (?, ?, ?)",
                (namespace.digest, namespace.model_digest, layout_text(file.layout)),
            )
            _add_segments(db, paths, file, segments)
            for ref in dict.fromkeys(ref for row in file.rows for ref in row):
                if ref not in known:
                    known[ref] = _add_block(db, file, ref, segments[ref.segment], bad)
            ids = [known[ref] for row in file.rows for ref in row]
            path = paths.session(file.identity)
            add_session(db, file, ids, round_up(path.stat().st_size))
            report.num_sessions += 1
            report.num_chunks += file.num_chunks


def _add_segments(
    db: sqlite3.Connection, paths: RootPaths, file: SessionFile, segments: dict[str, int]
) -> None:
    size = RecordFormat(file.layout, b"").record_bytes
    for name, shape in file.segments.items():
        if name not in segments:
            number = blocks.add_segment(db, name, file.namespace.digest, shape, size)
            write_used_bytes(db, number, allocated_bytes(paths.segment(name)))
            segments[name] = number


def _add_block(
    db: sqlite3.Connection,
    file: SessionFile,
    ref: BlockRef,
    segment: int,
    bad: set[tuple[str, int]],
) -> int:
    num_positions = file.segments[ref.segment][1]
    indexes = range(ref.position, num_positions * len(file.layers), num_positions)
    is_bad = any((ref.segment, index) in bad for index in indexes)
    key = ref.key if file.token_ids is not None and not is_bad else None
    block = blocks.add_block(db, segment, ref.position, key)
    if is_bad:
        db.execute("UPDATE blocks SET is_bad = 1 WHERE id = ?", (block,))
    return block


def _remove_unneeded(catalog: Catalog, paths: RootPaths, report: RebuildReport) -> None:
    kept = {paths.segment(name) for (name,) in catalog.rows("SELECT name FROM segments")}
    kept |= {paths.session(identity) for (identity,) in catalog.rows("SELECT id FROM sessions")}
    for path in list(paths.data_files()):
        if path not in kept or is_temporary(path):
            remove(path)
            report.num_removed += 1
    for lock in (paths.root / "owners").iterdir():
        if not is_alive(lock):
            remove(lock)
