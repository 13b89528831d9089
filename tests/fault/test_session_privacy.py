"""What others can see of a session store, and where nothing of it may ever lead."""

import os
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from offload.errors import ConfigError, CorruptCatalog, OffloadError, StorageError
from offload.sessions.checking import BadRecord
from offload.sessions.paths import new_id
from offload.sessions.rebuild import rebuild
from offload.sessions.schema import checksum
from offload.sessions.session_file import SessionFile, write_session_file
from offload.sessions.store import SessionStore
from tests.support.recipes import Recipe, assert_clean, quota_for, reading, save

_HOSTILE = "../../../outside"
_NOBODY = 65534

needs_chown = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Return the file that hostile names lead to; it must be there in the end, as it was."""
    files = [tmp_path / "outside", *(tmp_path / f"outside{end}" for end in _ENDS)]
    for file in files:
        file.write_text("precious")
    yield tmp_path
    assert [file.read_text() for file in files] == ["precious"] * len(files)


_ENDS = (".kvseg", ".kvsession", ".lock", ".kvseg.tmp", ".kvsession.tmp")


def _open(root: Path) -> SessionStore:
    return SessionStore(root, quota=quota_for(1 << 20), min_free=0)


def _modes(folder: Path) -> dict[int, set[int]]:
    """Return the permissions of folders and of files."""
    found: dict[int, set[int]] = {stat.S_IFDIR: set(), stat.S_IFREG: set()}
    for path in [folder, *folder.rglob("*")]:
        mode = path.lstat().st_mode
        found[stat.S_IFMT(mode)].add(stat.S_IMODE(mode))
    return found


@pytest.fixture
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_no_umask")
def test_files_are_for_their_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    private = {stat.S_IFDIR: {0o700}, stat.S_IFREG: {0o600}}
    with closing(_open(tmp_path / "made" / "for" / "root")) as store:
        save(store, "a", Recipe(1, num_chunks=3))
        store.rename("a", "b")
        file, held = store.open("b")
        path, index = held.place(file.rows[0][0], 0)
        store.quarantine([BadRecord(path, index, "for a test")])
        held.release()
        assert _modes(tmp_path / "made") == private
    rebuild(store.path)
    assert _modes(tmp_path / "made") == private


def test_folder_that_others_could_look_into_is_closed_to_them(root: Path) -> None:
    root.mkdir(mode=0o755)
    _open(root).close()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


_BAD_NAMES = ["../x", "/x", "a/b", "a\\b", "a\0b", "", ".", "..", ".x", " x", "x ", "x\n", "-x"]


@pytest.mark.parametrize("name", [*_BAD_NAMES, "x" * 129, None, 5])
def test_name_that_could_lead_elsewhere_is_refused(root: Path, name: str) -> None:
    with closing(_open(root)) as store:
        save(store, "a", Recipe(1))
        before = sorted(root.parent.rglob("*"))
        with pytest.raises(ConfigError):
            save(store, name, Recipe(2))
        with pytest.raises(ConfigError):
            store.rename("a", name)
        for act in (store.open, store.delete, store.info, store.verify, store.describe):
            with pytest.raises(OffloadError):
                act(name)
        assert sorted(root.parent.rglob("*")) == before
        assert_clean(store)


def test_root_may_be_a_link_of_its_owner(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root.symlink_to(tmp_path / "elsewhere")
    with closing(_open(root)) as store, reading(tmp_path / "reader") as reader:
        save(store, "a", Recipe(1))
        reader.check(store, "a", Recipe(1))


@needs_chown
def test_root_that_is_a_link_of_somebody_else_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root.symlink_to(tmp_path / "elsewhere")
    os.chown(root, _NOBODY, _NOBODY, follow_symlinks=False)
    with pytest.raises(ConfigError, match=f"link made by user {_NOBODY}"):
        _open(root)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@needs_chown
@pytest.mark.parametrize("inside", ["", "segments", "sessions", "owners", "quarantine"])
def test_folder_of_somebody_else_is_refused(root: Path, inside: str) -> None:
    _open(root).close()
    os.chown(root / inside, _NOBODY, _NOBODY)
    with pytest.raises(ConfigError, match="user"):
        _open(root)


@pytest.mark.parametrize("inside", ["segments", "sessions", "owners", "quarantine"])
def test_link_in_place_of_a_folder_is_refused(root: Path, outside: Path, inside: str) -> None:
    _open(root).close()
    (root / inside).rmdir()
    (root / inside).symlink_to(outside)
    with pytest.raises(ConfigError, match="is no folder of user"):
        _open(root)


@pytest.mark.parametrize("name", ["catalog.sqlite3", "lock"])
def test_link_in_place_of_a_file_is_refused(root: Path, outside: Path, name: str) -> None:
    _open(root).close()
    (root / name).unlink()
    (root / name).symlink_to(outside / "outside")
    with pytest.raises((ConfigError, StorageError)):
        _open(root)


def test_link_in_place_of_a_shard_is_not_followed(root: Path, outside: Path) -> None:
    with closing(_open(root)) as store:
        (root / "segments" / "00").symlink_to(outside)
        assert store.fsck(repair=True).is_clean
    rebuild(root)


def test_files_of_strangers_are_left_alone(root: Path) -> None:
    with closing(_open(root)) as store:
        save(store, "a", Recipe(1))
    strangers = [
        root / "segments" / "notes.txt",
        root / "segments" / "00" / "data.bin",
        root / "sessions" / "project" / "main.py",
        root / "owners" / "me.txt",
    ]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_text("precious")
    rebuild(root)
    with closing(_open(root)) as store:
        store.fsck(repair=True)
        assert_clean(store)
    assert all(stranger.read_text() == "precious" for stranger in strangers)


def test_folder_of_other_files_is_refused_and_left_as_it_is(root: Path) -> None:
    root.mkdir(mode=0o755)
    (root / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="holds 1 other files and is no session store"):
        _open(root)
    assert [path.name for path in root.iterdir()] == ["thesis.tex"]
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


def test_new_file_system_may_be_a_root(root: Path) -> None:
    (root / "lost+found").mkdir(parents=True)
    with closing(_open(root)) as store:
        save(store, "a", Recipe(1))
        assert_clean(store)


def test_segment_that_leads_elsewhere_is_a_corrupt_catalog_and_is_rebuilt(
    root: Path, outside: Path
) -> None:
    with closing(_open(root)) as store:
        save(store, "a", Recipe(1))
        with store._root.catalog.transaction() as db:
            [row] = db.execute("SELECT * FROM segments").fetchall()
            values = (_HOSTILE, *row[2:-1])
            db.execute("UPDATE segments SET name = ?, checksum = ?", (_HOSTILE, checksum(*values)))
        with pytest.raises(CorruptCatalog):
            store.open("a")
        with pytest.raises(CorruptCatalog):
            store.fsck(repair=True)
        store.delete("a")
    with closing(_open(root)) as store:
        assert_clean(store)


@pytest.mark.parametrize("column", ["segment", "session"])
def test_reservation_that_leads_elsewhere_removes_nothing_there(
    root: Path, outside: Path, column: str
) -> None:
    """Scenario: its owner has died, and whoever opens the root cleans up after it."""
    with closing(_open(root)) as store, store._root.catalog.transaction() as db:
        dead, names = new_id(), {"segment": new_id(), "session": new_id(), column: _HOSTILE}
        db.execute("INSERT INTO owners VALUES (?, 1)", (dead,))
        values = (new_id(), dead, 4096, names["segment"], names["session"])
        db.execute("INSERT INTO reservations VALUES (?, ?, ?, ?, ?)", values)
    with closing(_open(root)) as store:
        assert_clean(store)


def test_owner_that_leads_elsewhere_is_not_locked_there(root: Path, outside: Path) -> None:
    with closing(_open(root)) as store, store._root.catalog.transaction() as db:
        db.execute("INSERT INTO owners VALUES (?, 1)", (_HOSTILE,))
    with closing(_open(root)) as store:
        assert_clean(store)


def _forge(root: Path, **changes: object) -> None:
    """Write a session file whose checksums are right, and whose content is not."""
    with closing(_open(root)) as store:
        save(store, "a", Recipe(1))
        file: SessionFile = replace(store.describe("a"), **changes)  # type: ignore[arg-type]
        path = store._root.paths.session(store._root.identify("a"))
    write_session_file(path, file, sync=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"segments": {_HOSTILE: (2, 3)}, "rows": ()},
        {"identity": _HOSTILE},
        {"identity": 7},
        {"segments": {}, "rows": ()},
        {"name": "../x"},
    ],
    ids=["segment", "identity", "number", "nothing", "name"],
)
def test_forged_session_file_is_refused_and_set_aside(
    root: Path, outside: Path, changes: dict[str, object]
) -> None:
    _forge(root, **changes)
    with closing(_open(root)) as store, pytest.raises(StorageError):
        store.open("a")
    report = rebuild(root)
    with closing(_open(root)) as store:
        assert_clean(store)
        assert all(info.name == "a" for info in store.list())
    assert report.num_sessions + len(report.set_aside) == 1
