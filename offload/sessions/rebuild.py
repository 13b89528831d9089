"""Make a new catalog from the files alone."""

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from offload.errors import CorruptChunk, OffloadError, StorageError
from offload.sessions import blocks
from offload.sessions.catalog import (
    Catalog,
    catalog_files,
    get_meta,
    remove_catalog,
    set_meta,
)
from offload.sessions.checking import is_damage
from offload.sessions.garbage import collect, write_used_bytes
from offload.sessions.key_file import open_root_key
from offload.sessions.namespace import layout_text
from offload.sessions.owners import is_alive
from offload.sessions.paths import RootPaths, allocated_bytes, is_temporary, remove
from offload.sessions.quarantine import quarantine_file, quarantined_records
from offload.sessions.root import lock_root
from offload.sessions.saving import add_session
from offload.sessions.session_file import (
    TOKENS,
    BlockRef,
    SessionFile,
    read_session_file,
    renamed,
)
from offload.tiers.record import RecordFormat
from offload.tiers.sealing import Sealer
from offload.tiers.syscalls import as_storage_error
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
    path: Path,
    *,
    key: bytes | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> RebuildReport:
    """Replace the catalog of a root by one made from its session files.

    The old catalog goes to quarantine; its quota is kept if it can still be read. Records are not
    read: ``fsck`` does that. A rebuild that is killed can be begun again, and is by whoever opens
    the root next if the old catalog was no good.

    Parameters
    ----------
    path : Path
        The root.
    key : bytes, optional
        Of a root that is encrypted.
    progress : callable
        Told session files read, and how many there are.

    Raises
    ------
    SessionInUse
        Somebody has the root open.
    ConfigError
        The folder cannot be used, a newer version of this package has used it, or the key is not
        that of the root.
    DiskFull, StorageError
        The old catalog is still in place.
    """
    started, report = time.perf_counter(), RebuildReport()
    paths = RootPaths(Path(path).expanduser().absolute())
    paths.make()
    lock_fd = lock_root(paths, exclusive=True)
    try:
        sealer = open_root_key(paths, key)
        files = _read_sessions(paths, sealer, report, progress)
        settings = _settings(paths.catalog) or _settings(paths.new_catalog)
        remove_catalog(paths.new_catalog)
        with closing(
            Catalog(paths.new_catalog, "relaxed", is_sealed=sealer is not None)
        ) as catalog:
            with catalog.transaction() as db:
                for setting, value in settings.items():
                    set_meta(db, setting, value)
                _fill(db, paths, files, report)
            _remove_unneeded(catalog, paths, report)
            collect(catalog, paths)
        # Without a catalog the root counts as damaged, until the new one has its name.
        for old in catalog_files(paths.catalog):
            quarantine_file(paths, old)
        os.replace(paths.new_catalog, paths.catalog)
    except OffloadError:
        raise
    except OSError as error:
        raise as_storage_error(error, f"cannot rebuild {paths.catalog}") from error
    finally:
        os.close(lock_fd)
    report.seconds = time.perf_counter() - started
    return report


def _settings(catalog: Path) -> dict[str, str]:
    """Return what can be read of the settings in a catalog."""
    settings: dict[str, str] = {}
    if not catalog.exists():
        return settings
    damage = (sqlite3.Error, OffloadError, UnicodeDecodeError, OverflowError)
    with suppress(*damage), closing(sqlite3.connect(catalog)) as db:
        for key in _SETTINGS:
            value = get_meta(db, key)
            if value is not None:
                settings[key] = value
    return settings


def _read_sessions(
    paths: RootPaths,
    sealer: Sealer | None,
    report: RebuildReport,
    progress: Callable[[int, int], object],
) -> list[SessionFile]:
    """Return the newest good file of every name, oldest first, without most tensors."""
    found = [path for path in paths.data_files() if path.suffix == ".kvsession"]
    newest: dict[str, SessionFile] = {}
    for number, path in enumerate(found, 1):
        try:
            file = read_session_file(path, sealer)
            if path != paths.session(file.identity):
                raise CorruptChunk(f"{path} says that it is session {file.identity}")
            _check_segments(paths, file)
        except StorageError as error:
            if not is_damage(error):
                raise
            report.set_aside[path] = str(error)
        else:
            other = newest.get(file.name)
            if other is None or other.created_at < file.created_at:
                tokens = {TOKENS: torch.empty(0)} if file.token_ids is not None else {}
                newest[file.name] = renamed(file, tensors=tokens)
        progress(number, len(found))
    for path in report.set_aside:
        quarantine_file(paths, path)
    return sorted(newest.values(), key=lambda file: file.created_at)


def _check_segments(paths: RootPaths, file: SessionFile) -> None:
    size = RecordFormat(file.layout, b"").record_bytes
    for name, (num_layers, num_positions) in file.segments.items():
        path, expected = paths.segment(name), num_layers * num_positions * size
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise CorruptChunk(
                f"session {file.name!r} needs {expected} bytes of segment {name}, which has {found}"
            )


def _fill(
    db: sqlite3.Connection, paths: RootPaths, files: list[SessionFile], report: RebuildReport
) -> None:
    bad = set(quarantined_records(paths))
    keyed = {ref for file in files if file.token_ids is not None for ref in _refs(file)}
    segments: dict[str, int] = {}
    known: dict[BlockRef, int] = {}
    for file in files:
        namespace = file.namespace
        db.execute(
            "INSERT OR IGNORE INTO namespaces VALUES (?, ?, ?)",
            (namespace.digest, namespace.model_digest, layout_text(file.layout)),
        )
        _add_segments(db, paths, file, segments)
        for ref in _refs(file):
            if ref not in known:
                key = ref.key if ref in keyed else None
                known[ref] = _add_block(db, file, ref, segments[ref.segment], key, bad)
        ids = [known[ref] for row in file.rows for ref in row]
        add_session(db, file, ids, round_up(paths.session(file.identity).stat().st_size))
        report.num_sessions += 1
        report.num_chunks += file.num_chunks
    for segment in segments.values():
        _add_garbage(db, segment)


def _add_garbage(db: sqlite3.Connection, segment: int) -> None:
    """Have what only sessions that are gone needed punched, if it is not yet."""
    [count] = db.execute("SELECT num_positions FROM segments WHERE id = ?", (segment,)).fetchone()
    db.executemany(
        "INSERT INTO garbage_blocks SELECT ?1, ?2 WHERE NOT EXISTS "
        "(SELECT 1 FROM blocks WHERE segment = ?1 AND position = ?2)",
        [(segment, position) for position in range(count)],
    )


def _refs(file: SessionFile) -> dict[BlockRef, None]:
    return dict.fromkeys(ref for row in file.rows for ref in row)


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
    key: bytes | None,
    bad: set[tuple[str, int]],
) -> int:
    num_positions = file.segments[ref.segment][1]
    indexes = range(ref.position, num_positions * len(file.layers), num_positions)
    is_bad = any((ref.segment, index) in bad for index in indexes)
    block = blocks.add_block(db, segment, ref.position, None if is_bad else key)
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
    for lock in paths.owner_locks():
        if not is_alive(lock):
            remove(lock)
