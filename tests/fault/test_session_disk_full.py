"""A session store on a disk that is full, broken or read-only.

After each fault: what was saved before is intact, what failed has left nothing behind, and the
store works again once the disk does.
"""

import ctypes
import errno
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from offload import CapacityError, ConfigError, DiskFull, StorageError
from offload.sessions.store import SessionStore
from offload.tiers import punch
from offload.tiers.record_io import RecordIo
from offload.tiers.transfer import Transfer
from tests.support.ballast import Ballast, read_only
from tests.support.disk import FlakyCall, fail_with
from tests.support.full_disks import file_size_limit, small_file_system
from tests.support.recipes import Reader, Recipe, assert_clean, physical_bytes, reading, save
from tests.support.small_caches import (
    CAPACITY,
    SLOT_BYTES,
    check_continues,
    check_sound,
    draw_ids,
    make_cache,
    plain_after,
    step,
)

_OLD = {
    "a": Recipe(1, num_chunks=4, shared_chunks=2),
    "b": Recipe(2, num_chunks=3, shared_chunks=2),
}
_NEW = Recipe(3, num_chunks=8, shared_chunks=2)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with reading(tmp_path / "reader") as opened:
        yield opened


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "mounted", 4 << 20):
        yield tmp_path / "mounted"


def _open(root: Path, **arguments: Any) -> SessionStore:
    """Open a store with two pinned sessions."""
    store = SessionStore(root, quota="64MiB", min_free=0, **arguments)
    for name, recipe in _OLD.items():
        save(store, name, recipe, pin=True)
    return store


def _check_old(store: SessionStore, reader: Reader) -> None:
    assert [info.name for info in store.list() if info.is_pinned] == list(_OLD)
    for name, recipe in _OLD.items():
        reader.check(store, name, recipe)


@pytest.mark.parametrize("num_pages", range(0, 26, 3))
def test_disk_that_fills_up_during_a_save_is_disk_full_and_nothing_is_left(
    mounted: Path, reader: Reader, num_pages: int
) -> None:
    ballast = Ballast(mounted)

    def read(chunks: Sequence[int], out: Sequence[Tensor]) -> Transfer:
        ballast.leave(num_pages)
        return _NEW.content.read(chunks, out)

    with closing(_open(mounted / "root")) as store:
        try:
            store.save("new", replace(_NEW.content, read=read)).held.release()
            is_saved = True
        except DiskFull:
            is_saved = False
        assert [info.name for info in store.list()] == [*_OLD, "new"][: 2 + is_saved]
        ballast.drop()
        assert_clean(store)
        _check_old(store, reader)
        save(store, "new", _NEW)
        reader.check(store, "new", _NEW)


def test_save_that_cannot_fit_is_refused_before_anything_is_written(
    mounted: Path, reader: Reader
) -> None:
    with closing(_open(mounted / "root")) as store:
        Ballast(mounted).leave(20)
        before = sorted(mounted.rglob("*"))
        with pytest.raises(DiskFull, match=r"needed, .* missing, .* free on the device") as caught:
            save(store, "new", _NEW)
        assert caught.value.errno == errno.ENOSPC
        assert sorted(mounted.rglob("*")) == before
        _check_old(store, reader)
        assert_clean(store)


_SMALL: dict[str, Callable[[SessionStore], object]] = {
    "rename": lambda store: store.rename("a", "x"),
    "pin": lambda store: store.pin("a", pinned=False),
    "delete": lambda store: store.delete("a"),
    "open": lambda store: store.open("a")[1].release(),
    "list": lambda store: store.list(),
    "verify": lambda store: store.verify("a"),
    "fsck": lambda store: store.fsck(repair=True),
    "reopen": lambda store: SessionStore(store.path).close(),
    "close": lambda store: store.close(),
}


@pytest.mark.parametrize("num_pages", [0, 4])
@pytest.mark.parametrize("what", _SMALL)
def test_store_on_a_full_disk_does_what_it_can_and_is_whole_when_there_is_room(
    mounted: Path, reader: Reader, what: str, num_pages: int
) -> None:
    ballast = Ballast(mounted)
    with closing(_open(mounted / "root")) as store:
        ballast.leave(num_pages)
        try:
            _SMALL[what](store)
            is_done = True
        except DiskFull:
            is_done = False
    ballast.drop()
    with closing(SessionStore(mounted / "root")) as store:
        assert_clean(store)
        names = {info.name: info.is_pinned for info in store.list()}
        changed = {"rename": {"x": True}, "pin": {"a": False}, "delete": {}}
        first = changed.get(what, {"a": True}) if is_done else {"a": True}
        assert names == {"b": True, **first}
        for name in names:
            reader.check(store, name, _OLD[name.replace("x", "a")])


def test_sessions_can_be_read_on_a_full_disk(mounted: Path, reader: Reader) -> None:
    with closing(_open(mounted / "root")) as store:
        _check_old(store, reader)
        Ballast(mounted).leave(0)
        _check_old(store, reader)


@pytest.mark.parametrize("limit", [8 << 10, 40 << 10, 100 << 10])
def test_save_beyond_the_file_size_limit_is_disk_full_and_nothing_is_left(
    tmp_path: Path, reader: Reader, limit: int
) -> None:
    with closing(_open(tmp_path / "root")) as store:
        with file_size_limit(limit), pytest.raises(StorageError):
            save(store, "new", _NEW)
        assert_clean(store)
        _check_old(store, reader)
        save(store, "new", _NEW)
        reader.check(store, "new", _NEW)


def _break(patch: pytest.MonkeyPatch, name: str, code: int) -> None:
    if name == "pwritev":
        broken = FlakyCall(os.pwritev, fail_with(code))
        patched = functools.partial(RecordIo, pwritev=broken)
        patch.setattr("offload.sessions.segment_writer.RecordIo", patched)
        return

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    patch.setattr(os, name, fail)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize(
    "name", ["pwritev", "posix_fallocate", "fdatasync", "fsync", "replace", "mkdir", "open"]
)
def test_system_call_that_fails_during_a_save_is_named_and_nothing_is_left(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    with closing(_open(tmp_path / "root", durability="strict")) as store:
        with monkeypatch.context() as patch:
            _break(patch, name, code)
            with pytest.raises(StorageError) as caught:
                save(store, "new", _NEW)
        assert caught.value.errno == code
        assert isinstance(caught.value, DiskFull) == (code in (errno.ENOSPC, errno.EDQUOT))
        assert_clean(store)
        _check_old(store, reader)
        save(store, "new", _NEW)
        reader.check(store, "new", _NEW)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("name", ["fsync", "replace", "open"])
@pytest.mark.parametrize("what", ["rename", "pin"])
def test_system_call_that_fails_during_a_change_leaves_the_session_as_it_was(
    tmp_path: Path,
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    name: str,
    code: int,
) -> None:
    with closing(_open(tmp_path / "root", durability="strict")) as store:
        with monkeypatch.context() as patch:
            _break(patch, name, code)
            with pytest.raises(StorageError) as caught:
                _SMALL[what](store)
        assert caught.value.errno == code
        assert_clean(store)
        _check_old(store, reader)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_file_that_cannot_be_removed_stays_counted_and_goes_with_the_next_chance(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with closing(_open(tmp_path / "root")) as store:
        with monkeypatch.context() as patch:
            _break(patch, "unlink", code)
            store.delete("a")
        usage = store.usage()
        assert usage.garbage_bytes > 0
        assert usage.used_bytes >= physical_bytes(store.path)
        assert [info.name for info in store.list()] == ["b"]
        store.delete("b")
        assert store.usage().garbage_bytes == 0
        assert_clean(store)


def test_root_on_a_read_only_file_system_is_refused_with_the_reason(
    mounted: Path, reader: Reader
) -> None:
    _open(mounted / "root").close()
    with read_only(mounted), pytest.raises(ConfigError, match="Read-only file system"):
        SessionStore(mounted / "root")
    with closing(SessionStore(mounted / "root")) as store:
        _check_old(store, reader)


def test_cache_on_a_full_disk_stops_with_disk_full_and_goes_on_when_there_is_room(
    mounted: Path, tmp_path: Path
) -> None:
    ids, ballast = draw_ids(1, 40), Ballast(mounted)
    capacity = {**CAPACITY, "disk": 4000 * SLOT_BYTES}
    with make_cache(mounted, capacity=capacity) as cache:
        step(cache, ids)
        cache.flush()
        ballast.leave(8)
        with pytest.raises((DiskFull, CapacityError)):
            step(cache, draw_ids(1, 400, seed=2))
        check_sound(cache, 40)
        ballast.drop()
        check_continues(cache, plain_after(ids))


def test_cache_saved_to_a_full_disk_can_be_used_on_and_saved_when_there_is_room(
    mounted: Path, tmp_path: Path
) -> None:
    ids, ballast = draw_ids(1, 60), Ballast(mounted)
    with make_cache(tmp_path) as cache, closing(SessionStore(mounted, min_free=0)) as store:
        step(cache, ids)
        ballast.leave(6)
        with pytest.raises(DiskFull):
            cache.save("a", store=store, token_ids=ids)
        assert store.list() == []
        check_continues(cache, plain_after(ids), num_new=2)
        ballast.drop()
        assert cache.save("a", store=store).num_tokens == 62


@pytest.mark.parametrize("floor", [0, "0"])
def test_floor_of_nothing_lets_the_device_fill_up(mounted: Path, floor: int | str) -> None:
    SessionStore(mounted / "root", quota="64MiB", min_free="1GiB").close()
    with closing(SessionStore(mounted / "root")) as store:
        with pytest.raises(DiskFull, match="1 GiB are to stay free"):
            save(store, "a", _NEW)
        assert store.usage().min_free_bytes == 1 << 30
    with closing(SessionStore(mounted / "root", min_free=floor)) as store:
        assert store.usage().min_free_bytes == 0
        save(store, "a", _NEW)
        assert_clean(store)


@pytest.mark.parametrize("floor", [-1, "-1", "", "none", False, 0.0])
def test_floor_that_is_no_size_is_refused(tmp_path: Path, floor: Any) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        SessionStore(tmp_path / "root", min_free=floor)


def test_fallocate_is_looked_up_once_however_many_holes_are_punched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = ctypes.CDLL, []

    def look_up(*args: Any, **kwargs: Any) -> ctypes.CDLL:
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(ctypes, "CDLL", look_up)
    punch._find_fallocate.cache_clear()
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(3 * 4096))
        file.flush()
        codes = [punch.punch_hole(file.fileno(), i * 4096, 4096) for i in range(3)]
    punch._find_fallocate.cache_clear()
    assert codes[0] == codes[1] == codes[2]
    assert len(calls) == 1
