"""Damage that was done on purpose, what the store makes of it, and what it must not do."""

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload.errors import (
    ConfigError,
    CorruptCatalog,
    CorruptChunk,
    DiskFull,
    SessionNotFound,
    StorageError,
)
from offload.sessions import session_file
from offload.sessions.catalog import _translated
from offload.sessions.checking import BadRecord
from offload.sessions.garbage import collect
from offload.sessions.ledger import _LOG_BYTES, OVERHEAD_BYTES
from offload.sessions.rebuild import rebuild
from offload.sessions.store import SessionStore
from tests.support.recipes import (
    BLOCK_BYTES,
    Reader,
    Recipe,
    assert_clean,
    quota_for,
    reading,
    save,
)

_RECORD_BYTES = BLOCK_BYTES // 2


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> Iterator[SessionStore]:
    with closing(SessionStore(root, quota=quota_for(1 << 20), min_free=0)) as opened:
        yield opened


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with reading(tmp_path / "reader") as opened:
        yield opened


def _execute(store: SessionStore, statement: str, *values: object) -> None:
    with store._root.catalog.transaction() as db:
        assert db.execute(statement, values).rowcount > 0


def _record(store: SessionStore, name: str, position: int, layer_number: int = 0) -> BadRecord:
    file, held = store.open(name)
    held.release()
    path, index = held.place(file.rows[0][position], layer_number)
    return BadRecord(path, index, "for a test")


def _damage(record: BadRecord) -> None:
    with record.path.open("r+b") as file:
        file.seek(record.index * _RECORD_BYTES + 4096)
        file.write(bytes(byte ^ 1 for byte in os.pread(file.fileno(), 1, file.tell())))


def test_session_saved_again_under_its_name_keeps_what_it_shares_with_itself(
    store: SessionStore, reader: Reader
) -> None:
    """Scenario: a conversation is saved after every turn."""
    turns = [Recipe(7, num_chunks=n, shared_chunks=n) for n in (2, 4, 7)]
    for turn in turns:
        save(store, "a", turn)
        reader.check(store, "a", turn)
        assert_clean(store)
    assert store.usage().used_bytes == quota_for(turns[-1].num_bytes)


@pytest.mark.parametrize("column", ["expires_at", "is_pinned"])
def test_flipped_row_neither_ends_a_session_nor_evicts_it(
    store: SessionStore, reader: Reader, column: str
) -> None:
    save(store, "a", Recipe(1), pin=True)
    before = {"expires_at": None, "is_pinned": 1}[column]
    _execute(store, f"UPDATE sessions SET {column} = 0")
    if column == "expires_at":
        with pytest.raises(CorruptCatalog):
            store.list()
    with pytest.raises(CorruptCatalog):
        store._root.ledger.reserve(1 << 20, "0" * 32, "1" * 32, None)
    _execute(store, f"UPDATE sessions SET {column} = ?", before)
    reader.check(store, "a", Recipe(1))


@pytest.mark.parametrize("position", [0, 1, -1, 3, 1 << 40, "x"])
def test_garbage_that_is_alive_or_nowhere_is_not_punched(
    store: SessionStore, reader: Reader, position: object
) -> None:
    shared, other = Recipe(1, shared_chunks=2), Recipe(2, shared_chunks=2)
    save(store, "a", shared)
    save(store, "b", other)
    _execute(
        store,
        "INSERT INTO garbage_blocks SELECT id, ? FROM segments ORDER BY id LIMIT 1",
        position,
    )
    with pytest.raises(CorruptCatalog):
        collect(store._root.catalog, store._root.paths)
    reader.check(store, "a", shared)
    reader.check(store, "b", other)


def test_record_that_is_damaged_is_quarantined_and_its_neighbours_are_found(
    store: SessionStore, reader: Reader
) -> None:
    recipe = Recipe(1, num_chunks=4)
    save(store, "a", recipe)
    _damage(_record(store, "a", position=2))
    assert reader.check_prefix(store, recipe) == 2
    with pytest.raises(CorruptChunk, match="1 of its chunks are in quarantine"):
        store.open("a")
    assert [info.is_damaged for info in store.list()] == [True]
    save(store, "b", recipe)
    reader.check(store, "b", recipe)
    assert reader.check_prefix(store, recipe) == 4


def test_quarantine_takes_no_more_than_the_quota_has_room_for(root: Path) -> None:
    recipe = Recipe(1, num_chunks=6)
    quota = quota_for(recipe.num_bytes + 4096)
    with closing(SessionStore(root, quota=quota, min_free=0)) as store:
        save(store, "a", recipe)
        unused = OVERHEAD_BYTES - _LOG_BYTES - store._root.catalog.num_bytes
        earlier = store._root.paths.quarantine / "earlier"
        earlier.write_bytes(bytes(unused - 2 * _RECORD_BYTES))
        for position in range(6):
            _damage(_record(store, "a", position))
        report = store.fsck(repair=True)
        assert len(report.bad_records) == 6
        usage = store.usage()
        assert usage.used_bytes <= usage.quota_bytes
        copies = sorted(store._root.paths.quarantine.glob("*.kvrecord"))
        assert len(copies) == 6
        assert 0 < sum(path.stat().st_size for path in copies) < 6 * _RECORD_BYTES
    rebuild(root)
    with closing(SessionStore(root)) as store:
        assert [info.is_damaged for info in store.list()] == [True]


def _without_descriptors(act: Callable[[], object], where: Any, suffix: str) -> None:
    """Have ``open`` of a module or class fail for some files, and expect to hear of it."""
    real = where.open

    def no_more(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if str(path).endswith(suffix):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, "open", no_more)
        with pytest.raises(StorageError) as caught:
            act()
    assert caught.value.errno == errno.EMFILE


def test_process_without_descriptors_does_not_take_good_records_for_bad(
    store: SessionStore, reader: Reader
) -> None:
    save(store, "a", Recipe(1))
    _without_descriptors(lambda: store.verify("a"), os, ".kvseg")
    _without_descriptors(lambda: reader.check_prefix(store, Recipe(1)), os, ".kvseg")
    reader.check(store, "a", Recipe(1))
    assert_clean(store)


def test_process_without_descriptors_does_not_take_good_session_files_for_bad(
    root: Path, store: SessionStore, reader: Reader
) -> None:
    save(store, "a", Recipe(1))
    _without_descriptors(lambda: store.fsck(repair=True), Path, ".kvsession")
    store.close()
    _without_descriptors(lambda: rebuild(root), Path, ".kvsession")
    with closing(SessionStore(root)) as opened:
        reader.check(opened, "a", Recipe(1))
        assert_clean(opened)


def test_damaged_record_is_reported_once_and_then_as_quarantined(store: SessionStore) -> None:
    save(store, "a", Recipe(1, num_chunks=4))
    _damage(_record(store, "a", position=2))
    first, second = store.verify("a"), store.verify("a")
    assert [len(report.bad_records) for report in (first, second)] == [1, 1]
    assert [len(report.new_records) for report in (first, second)] == [1, 0]
    assert second.bad_records[0].reason == f"already quarantined: {first.bad_records[0].reason}"
    assert not second.is_clean


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SQLITE_CORRUPT_INDEX", CorruptCatalog),
        ("SQLITE_NOTADB", CorruptCatalog),
        ("SQLITE_ERROR", CorruptCatalog),
        ("SQLITE_CONSTRAINT_UNIQUE", CorruptCatalog),
        ("SQLITE_FULL", DiskFull),
        ("SQLITE_IOERR_SHMSIZE", DiskFull),
        ("SQLITE_BUSY_RECOVERY", StorageError),
        ("SQLITE_PROTOCOL", StorageError),
        ("SQLITE_IOERR_READ", StorageError),
        ("SQLITE_READONLY", StorageError),
        ("SQLITE_NOMEM", StorageError),
    ],
)
def test_error_of_sqlite_is_damage_only_if_it_says_so(
    root: Path, name: str, expected: type[StorageError]
) -> None:
    error = sqlite3.OperationalError("for a test")
    error.sqlite_errorname = name
    with pytest.raises(StorageError) as caught, _translated(root):
        raise error
    assert type(caught.value) is expected


def test_catalog_of_a_newer_version_is_neither_used_nor_rebuilt(
    root: Path, store: SessionStore, reader: Reader
) -> None:
    save(store, "a", Recipe(1))
    _user_version(store, 3)
    store.close()
    with pytest.raises(ConfigError, match="has version 3, this code reads 1"):
        SessionStore(root)
    with closing(sqlite3.connect(root / "catalog.sqlite3")) as db:
        db.execute("PRAGMA user_version = 1")
    with closing(SessionStore(root)) as opened:
        reader.check(opened, "a", Recipe(1))


def _user_version(store: SessionStore, version: int) -> None:
    with store._root.catalog.transaction() as db:
        db.execute(f"PRAGMA user_version = {version}")


def test_session_file_of_a_newer_version_is_neither_read_nor_removed(
    root: Path, store: SessionStore, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, "a", Recipe(1))
    with monkeypatch.context() as patch:
        patch.setattr(session_file, "VERSION", 3)
        save(store, "b", Recipe(2))
    with pytest.raises(ConfigError, match="newer version"):
        store.open("b")
    store.close()
    with pytest.raises(ConfigError, match="newer version"):
        rebuild(root)
    with closing(SessionStore(root)) as opened:
        reader.check(opened, "a", Recipe(1))
        monkeypatch.setattr(session_file, "VERSION", 3)
        assert opened.describe("b").name == "b"


def test_rebuild_gives_back_what_only_a_lost_session_needed(
    root: Path, store: SessionStore, reader: Reader
) -> None:
    kept, lost = Recipe(2, num_chunks=3, shared_chunks=2), Recipe(1, num_chunks=6, shared_chunks=2)
    save(store, "lost", lost)
    save(store, "kept", kept)
    path = store._root.paths.session(store._root.identify("lost"))
    store.close()
    path.unlink()
    assert rebuild(root).num_sessions == 1
    with closing(SessionStore(root)) as opened:
        reader.check(opened, "kept", kept)
        assert reader.check_prefix(opened, kept) == 3
        assert opened.usage().used_bytes == quota_for(kept.num_bytes)
        assert_clean(opened)


def test_rebuild_finds_chunks_by_tokens_that_only_a_later_session_knows(
    root: Path, store: SessionStore, reader: Reader
) -> None:
    """Scenario: the chunks of a cache were saved with tokens, then without, then with again."""
    recipe = Recipe(1)
    saved = store.save("a", recipe.content)
    nameless = replace(recipe.content, token_ids=None, known=saved.refs)
    store.save("b", nameless).held.release()
    saved.held.release()
    save(store, "a", recipe)
    store.close()
    rebuild(root)
    with closing(SessionStore(root)) as opened:
        assert reader.check_prefix(opened, recipe) == recipe.num_chunks
        assert opened.usage().num_sessions == 2
        assert_clean(opened)


def test_rebuild_keeps_the_quota_though_it_was_killed_once(root: Path, store: SessionStore) -> None:
    """Scenario: killed when the old catalog was away, and the new one had no name yet."""
    save(store, "a", Recipe(1))
    quota_bytes = store.usage().quota_bytes
    store.close()
    os.rename(root / "catalog.sqlite3", root / "catalog.sqlite3.new")
    with closing(SessionStore(root)) as opened:
        assert opened.usage().quota_bytes == quota_bytes
        assert_clean(opened)


def test_check_of_a_session_that_is_deleted_meanwhile_finds_nothing_bad(
    root: Path, store: SessionStore
) -> None:
    save(store, "a", Recipe(1, num_chunks=4))
    save(store, "b", Recipe(2, num_chunks=2))

    def delete(done: int, total: int) -> None:
        if "a" in [info.name for info in store.list()]:
            with closing(SessionStore(root)) as other:
                other.delete("a")

    report = store.fsck(repair=True, progress=delete)
    assert report.is_clean
    assert [info.name for info in store.list()] == ["b"]
    with pytest.raises(SessionNotFound):
        store.verify("a")


def test_longer_name_that_needs_another_page_is_accounted_for(store: SessionStore) -> None:
    recipe = Recipe(1, num_chunks=0)
    content = recipe.content
    save(store, "a", recipe)
    size = store._root.paths.session(store._root.identify("a")).stat().st_size
    padding = "x" * (8192 - size - 60)  # times take a few digits more or less
    content = replace(content, state={**content.state, "padding": padding})
    store.save("a", content).held.release()
    assert store.usage().used_bytes == quota_for(8192)
    store.rename("a", "a" * 128)
    assert store.usage().used_bytes == quota_for(3 * 4096)
    assert_clean(store)
