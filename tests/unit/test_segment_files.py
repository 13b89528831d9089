import stat
from pathlib import Path

import pytest

from offload.errors import ConfigError, StorageError
from offload.tiers.segment_files import SegmentFiles
from offload.types import PAGE_BYTES


def _write_pages(files: SegmentFiles, segment: int, count: int) -> None:
    with files.open(segment, writing=True, direct=False) as fd, open(fd, "wb", closefd=False) as f:
        f.write(b"x" * (count * PAGE_BYTES))


def test_folder_and_files_are_made_for_the_user_only(tmp_path: Path) -> None:
    files = SegmentFiles(tmp_path / "a" / "b")
    _write_pages(files, 0, 1)
    assert files.path(0).parent == tmp_path / "a" / "b"
    assert stat.S_IMODE(files.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(files.path(0).stat().st_mode) == 0o600


def test_punched_hole_reads_as_zeros_and_gives_its_space_back(tmp_path: Path) -> None:
    files = SegmentFiles(tmp_path)
    _write_pages(files, 0, 8)
    before = files.path(0).stat()
    if not files.punch(0, 2 * PAGE_BYTES, 4 * PAGE_BYTES):
        pytest.skip("the file system cannot punch holes")
    after, content = files.path(0).stat(), files.path(0).read_bytes()
    assert after.st_size == before.st_size
    assert after.st_blocks * 512 <= before.st_blocks * 512 - 4 * PAGE_BYTES
    assert content.count(b"x") == content.count(b"\0") == 4 * PAGE_BYTES


def test_segment_that_was_never_written_has_no_space_to_give_back(tmp_path: Path) -> None:
    files = SegmentFiles(tmp_path)
    assert files.punch(7, 0, PAGE_BYTES)
    files.unlink(7)
    assert list(tmp_path.iterdir()) == []


def test_link_in_place_of_a_segment_is_not_followed(tmp_path: Path) -> None:
    files = SegmentFiles(tmp_path / "segments")
    (tmp_path / "target").write_text("keep")
    files.path(0).symlink_to(tmp_path / "target")
    with (
        pytest.raises(StorageError, match="cannot open"),
        files.open(0, writing=True, direct=False),
    ):
        pass
    assert (tmp_path / "target").read_text() == "keep"


def test_segment_that_cannot_be_removed_is_an_error_with_its_path(tmp_path: Path) -> None:
    files = SegmentFiles(tmp_path)
    files.path(3).mkdir()
    with pytest.raises(StorageError, match=f"cannot remove {files.path(3)}"):
        files.unlink(3)


def test_directory_below_a_file_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"cannot use {tmp_path}/file/x: Not a directory"):
        SegmentFiles(tmp_path / "file" / "x")
