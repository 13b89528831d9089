"""Archives that are damaged or change, and disks that fail on the way."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from offload.errors import CorruptChunk, DiskFull, OffloadError
from offload.sessions.store import SessionStore
from offload.types import PAGE_BYTES
from tests.support.archives import (
    compress,
    decompress,
    refuse,
    tiny_content,
    unchanged,
)
from tests.support.full_disks import file_size_limit, small_file_system
from tests.support.sessions import (
    LAYERS,
    expected_payloads,
    make_content,
    read_back,
    save,
    small_store,
)


def test_truncated_archive_is_refused_wherever_it_ends(
    store: SessionStore, path: Path, bad: Path
) -> None:
    content = path.read_bytes()
    for length in {*range(0, len(content), 37), *range(len(content) - 9, len(content))}:
        bad.write_bytes(content[:length])
        refuse(store, bad, CorruptChunk, "ends|no zstd file|frame")


def test_truncated_content_is_refused_wherever_it_ends(
    store: SessionStore, path: Path, bad: Path
) -> None:
    content = decompress(path)
    for length in range(0, len(content), 2477):
        bad.write_bytes(compress(content[:length]))
        refuse(store, bad, CorruptChunk, "the content ends after")


def test_flipped_bit_is_found_or_changes_nothing_wherever_it_is(
    store: SessionStore, path: Path, bad: Path
) -> None:
    # The same content can be compressed in many ways: a few flips lead from one to another.
    content = path.read_bytes()
    good = expected_payloads(tiny_content())
    num_refused = 0
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        bad.write_bytes(flipped)
        with unchanged(store):
            try:
                store.import_(bad, "new")
            except OffloadError:
                num_refused += 1
            else:
                assert read_back(store, "new") == good
                store.delete("new")
    assert num_refused > 0.95 * len(range(0, len(content), 3))


def test_flipped_bit_before_compression_is_found_wherever_it_is(
    store: SessionStore, path: Path, bad: Path
) -> None:
    content = decompress(path)
    for position in range(0, len(content), 397):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        bad.write_bytes(compress(bytes(flipped)))
        refuse(store, bad, OffloadError)


NOISE_BYTES = 64 * len(LAYERS) * (8 << 10)


@pytest.fixture(scope="module")
def large_content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("large")
    with small_store(folder / "source") as source:
        save(source, "chat", make_content(64, 1, noise=True))
        source.export("chat", folder / "large")
    return (folder / "large").read_bytes()


@pytest.fixture
def large(large_content: bytes, tmp_path: Path) -> Path:
    """An archive of 1.5 MiB, whose records take 2.3 MiB."""
    copy = tmp_path / "large"
    copy.write_bytes(large_content)
    return copy


def test_import_that_the_quota_has_no_room_for_changes_nothing(tmp_path: Path, large: Path) -> None:
    with small_store(tmp_path / "root", quota="10MiB") as store:
        store.save("old", make_content(2, 7), pin=True).held.release()
        refuse(store, large, DiskFull, "missing, and no session that is neither pinned nor open")


def test_damaged_archive_evicts_nobody_and_a_good_one_does(tmp_path: Path, large: Path) -> None:
    with small_store(tmp_path / "root", quota="11MiB") as store:
        save(store, "old", make_content(32, 7))
        content = large.read_bytes()
        large.write_bytes(content[:-30] + bytes([content[-30] ^ 1]) + content[-29:])
        refuse(store, large, CorruptChunk)
        large.write_bytes(content)
        store.import_(large, "new")
        assert [info.name for info in store.list()] == ["new"]
        assert store.fsck().is_clean


def test_import_to_a_full_disk_changes_nothing(store: SessionStore, large: Path) -> None:
    with file_size_limit(2 << 20):
        refuse(store, large, DiskFull, "no room for")
    store.import_(large, "new")


def test_export_to_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with small_store(tmp_path / "root") as store:
        save(store, "chat", make_content(64, 1, noise=True))
        with unchanged(store), file_size_limit(NOISE_BYTES // 2), pytest.raises(DiskFull):
            store.export("chat", folder / "a")
        assert list(folder.iterdir()) == []


def test_export_to_a_file_system_without_room_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with small_file_system(folder, 1 << 20), small_store(tmp_path / "root") as store:
        save(store, "chat", make_content(64, 1, noise=True))
        with unchanged(store), pytest.raises(DiskFull, match=r"export to .*No space left"):
            store.export("chat", folder / "a")
        assert list(folder.iterdir()) == []


def test_export_of_a_damaged_record_leaves_no_file_and_quarantines_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("earlier")
    with small_store(tmp_path / "root") as store:
        save(store, "chat", make_content(4, 1, noise=True))
        [segment] = (tmp_path / "root" / "segments").rglob("*.kvseg")
        with segment.open("r+b") as file:
            file.seek(2 * (PAGE_BYTES + (8 << 10)) + PAGE_BYTES + 100)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(CorruptChunk, match="checksum of 1 of 2 units"):
            store.export("chat", folder / "a", overwrite=True)
        assert [entry.read_text() for entry in folder.iterdir()] == ["earlier"]
        with pytest.raises(CorruptChunk, match="1 of its chunks are in quarantine"):
            store.export("chat", folder / "b")
        store.delete("chat")
        assert store.fsck().is_clean


class HadEnoughError(Exception):
    """Raised by a progress bar, say because the user has had enough."""


@pytest.mark.parametrize("after", [1, 11, 12])
def test_interrupted_export_leaves_no_file(after: int, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with small_store(tmp_path / "root") as store:
        save(store, "chat", make_content(4, 1))
        with unchanged(store), pytest.raises(HadEnoughError):
            store.export("chat", folder / "a", interrupt(after))
        assert list(folder.iterdir()) == []
        store.delete("chat")


@pytest.mark.parametrize("after", [1, 192, 193, 384])
def test_interrupted_import_changes_nothing(after: int, store: SessionStore, large: Path) -> None:
    with unchanged(store), pytest.raises(HadEnoughError):
        store.import_(large, "new", interrupt(after))


def interrupt(after: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= after:
            raise HadEnoughError

    return progress


@pytest.mark.parametrize("cut", [True, False])
def test_archive_that_changes_while_it_is_read_is_refused(
    cut: bool, store: SessionStore, large: Path
) -> None:
    def tamper(done: int, total: int) -> None:
        if done == total // 2:
            with large.open("r+b") as file:
                if cut:
                    file.truncate(1 << 20)
                file.seek(700_000)
                file.write(b"tampered")

    with unchanged(store), pytest.raises(CorruptChunk):
        store.import_(large, "new", tamper)
