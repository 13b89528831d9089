"""A session store with one byte changed, each in turn: nothing wrong ever comes out of it.

What is read is what was saved, or there is an ``OffloadError``. Where damage shows, a rebuild and a
repair lead back to a clean store. The long form (``-m soak``) takes every byte of every file, and
prints the table of ``docs/faults.md``.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from offload.errors import OffloadError, SessionNotFound
from offload.sessions.rebuild import rebuild
from offload.sessions.store import SessionStore
from tests.support.recipes import Reader, Recipe, quota_for, reading, save

# One bit apart, so that a damaged index could take one for the other.
_SAVED = {
    "a": Recipe(1, num_chunks=2, shared_chunks=1),
    "c": Recipe(2, num_chunks=2, shared_chunks=1),
}
_ADDED = Recipe(3, num_chunks=2, shared_chunks=1)
_MASKS = (0x10, 0xFF)
_KINDS = ("segment", "session", "catalog", "log", "lock")
_FIELDS = {
    "segment": (0, 8, 10, 11, 12, 16, 20, 24, 28, 32, 40, 48, 64, 72, 80, 88, 4088),
    "session": (0, 8, 12, 16, 24, 32, 4088),
    "catalog": (0, *range(16, 25), *range(28, 72, 4), 92, 96, 100, 101, 103, 105, 107, 108),
    "log": (*range(0, 56, 4),),
    "lock": (),
}
"""Where the fields of each header start."""
_STRIDES = {"segment": 1009, "session": 211, "catalog": 1009, "log": 1009, "lock": 1}
"""Of the short form; no divisors of a page."""

Files = dict[Path, bytes]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Return the files of a root with two sessions, and a log beside its catalog."""
    root = tmp_path_factory.mktemp("flips") / "root"
    SessionStore(root, quota=quota_for(1 << 20), min_free=0, durability="none").close()
    for name, recipe in _SAVED.items():
        with SessionStore(root, durability="none") as store:
            save(store, name, recipe)
            # With a log, as a killed process leaves it.
            shutil.copytree(root, root.with_name("open"), dirs_exist_ok=True)
    closed = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    files = {path.relative_to(root): content for path, content in closed.items()}
    opened = root.with_name("open")
    for path in (*opened.glob("catalog*"), *opened.glob("owners/*")):
        files[Path("killed") / path.relative_to(opened)] = path.read_bytes()
    return files


def _kind(path: Path) -> str | None:
    """Return what is in a file; None for what is made again, or is there a second time."""
    if path.name.endswith("-shm") or path == Path("killed", "catalog.sqlite3"):
        return None
    if path.suffix in (".kvseg", ".kvsession"):
        return {".kvseg": "segment", ".kvsession": "session"}[path.suffix]
    if path.name.startswith("catalog"):
        return "log" if path.name.endswith("-wal") else "catalog"
    return "lock"


def _lay_out(root: Path, saved: Files, kind: str) -> None:
    """Write the files of a root that was closed, or of one whose last user was killed."""
    shutil.rmtree(root, ignore_errors=True)
    for path, content in saved.items():
        if path.parts[0] == "killed" and kind not in ("log", "lock"):
            continue
        target = root / _inside(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    root.chmod(0o700)


def _inside(path: Path) -> Path:
    return Path(*path.parts[1:]) if path.parts[0] == "killed" else path


def _flip(path: Path, position: int, mask: int) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[position] ^= mask
    path.write_bytes(content)


class Witness:
    """Uses a damaged store in every way, and notes what it says.

    Parameters
    ----------
    root : Path
    reader : Reader
    kind : str
        Of the file that was damaged. With the end of a log goes what was saved last.
    """

    def __init__(self, root: Path, reader: Reader, kind: str) -> None:
        self._root = root
        self._lost_log = kind == "log"
        self._writes = kind in ("catalog", "log")
        self._reader = reader
        self.errors: list[OffloadError] = []

    def use(self) -> str:
        """Return ``harmless``, ``detected``, or ``repaired`` when the store was opened.

        Raises
        ------
        AssertionError
            Something wrong was read.
        Exception
            Not one of ours.
        """
        stores: list[SessionStore] = []
        if self._try(lambda: stores.append(SessionStore(self._root, durability="none"))):
            with stores[0]:
                self._use(stores[0])
        if self.errors:
            self._heal()
            return "detected"
        return "repaired" if any((self._root / "quarantine").iterdir()) else "harmless"

    def _use(self, store: SessionStore) -> None:
        names: list[str] = []
        if self._try(lambda: names.extend(info.name for info in store.list())):
            assert set(names) <= set(_SAVED)
            if len(names) < len(_SAVED) and not self._lost_log:
                # What does not show here shows when somebody looks.
                self._try(lambda: self._report(store))
        self._try(store.usage)
        for name, recipe in _SAVED.items():
            self._try(partial(self._reader.check, store, name, recipe))
            self._try(partial(self._reader.check_prefix, store, recipe))
        if self._writes:
            self._try(lambda: store.open("b"), expected=SessionNotFound)
            self._try(lambda: save(store, "b", _ADDED))
            self._try(lambda: self._reader.check(store, "b", _ADDED), expected=SessionNotFound)
        self._try(lambda: store.pin("a"))
        if self._try(lambda: store.rename("a", "e")):
            self._try(lambda: self._reader.check(store, "e", _SAVED["a"]))
        self._try(lambda: store.delete("c"))

    def _report(self, store: SessionStore) -> None:
        report = store.fsck()
        assert not report.is_clean
        raise SessionNotFound(str(report))

    def _heal(self) -> None:
        rebuild(self._root)
        with SessionStore(self._root, durability="none") as store:
            store.fsck(repair=True)
            report = store.fsck()
            assert [report.bad_sessions, report.orphans, report.catalog_errors] == [{}, [], []]
            recipes = {**_SAVED, "b": _ADDED, "e": _SAVED["a"]}
            sessions = store.list()
            assert bool(report.bad_records) == any(info.is_damaged for info in sessions)
            for info in sessions:
                if not info.is_damaged:
                    self._reader.check(store, info.name, recipes[info.name])

    def _try(self, act: Callable[[], object], expected: type | None = None) -> bool:
        try:
            act()
        except OffloadError as error:
            if expected is None or not isinstance(error, expected):
                self.errors.append(error)
            return False
        return True


def _flip_each(tmp_path: Path, saved: Files, kind: str, stride: int, mask: int) -> Counter[str]:
    """Change one byte after the other in all files of a kind; count what came of it."""
    root, fields, counts = tmp_path / "root", _FIELDS[kind], Counter[str]()
    with reading(tmp_path / "reader") as reader:
        for path in [path for path in saved if _kind(path) == kind]:
            # An empty file gets a byte.
            for position in {*fields, *range(0, max(1, len(saved[path])), stride)}:
                _lay_out(root, saved, kind)
                _flip(root / _inside(path), position, mask)
                try:
                    counts[Witness(root, reader, kind).use()] += 1
                except Exception as error:
                    what = f"byte {position} of {path} flipped by {mask:#x}"
                    raise AssertionError(f"{what}: {error!r}") from error
            fields = ()
    return counts


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Many thousand stores are opened here: without a dozen threads and lines of log for each."""
    monkeypatch.setattr("offload.sessions.store._THREADS", 1)
    monkeypatch.setattr("offload.sessions.fsck._THREADS", 1)
    monkeypatch.setattr("offload.sessions.segment_writer._THREADS", 1)
    caplog.set_level(logging.CRITICAL)


@pytest.mark.parametrize("kind", _KINDS)
def test_flipped_byte_is_harmless_or_an_error_of_ours(
    tmp_path: Path, saved: Files, kind: str
) -> None:
    counts = _flip_each(tmp_path, saved, kind, _STRIDES[kind], _MASKS[0])
    assert (counts["detected"] + counts["repaired"] > 0) == (kind != "lock"), counts


@pytest.mark.soak
@pytest.mark.timeout(24 * 3600)
@pytest.mark.parametrize("mask", _MASKS)
@pytest.mark.parametrize("kind", _KINDS)
def test_any_flipped_byte_is_harmless_or_an_error_of_ours(
    tmp_path: Path, saved: Files, kind: str, mask: int
) -> None:
    counts = _flip_each(tmp_path, saved, kind, 1, mask)
    print(f"\n{kind:8} {mask:#04x} {sum(counts.values()):7} bytes: {dict(counts)}")
