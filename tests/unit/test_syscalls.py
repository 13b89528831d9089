import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from offload.errors import ConfigError, CorruptChunk, DiskFull, StorageError
from offload.tiers.syscalls import VectoredCall, read_fully, supports_direct_io, write_fully
from offload.types import PAGE_BYTES


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def _buffers(*sizes: int, fill: bytes = b"\0") -> list[memoryview]:
    return [memoryview(bytearray(fill * size)) for size in sizes]


def _pattern(num_bytes: int) -> bytes:
    return bytes(i % 251 for i in range(num_bytes))


def _at_most(call: VectoredCall, limit: int) -> VectoredCall:
    """Make a call that moves at most ``limit`` bytes, as the system is free to do."""

    def limited(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        room, part = limit, []
        for buffer in buffers:
            part.append(buffer[:room])
            room -= len(part[-1])
        return call(fd, part, offset)

    return limited


def _interrupted(call: VectoredCall) -> VectoredCall:
    """Make a call that is interrupted every other time."""
    calls = iter(range(1000))

    def flaky(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if next(calls) % 2 == 0:
            raise InterruptedError
        return call(fd, buffers, offset)

    return flaky


def _failing(code: int) -> VectoredCall:
    def fail(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("limit", [1000, PAGE_BYTES, PAGE_BYTES + 1, 3 * PAGE_BYTES - 1])
def test_short_writes_and_reads_are_continued(fd: int, limit: int) -> None:
    content = _pattern(7 * PAGE_BYTES)
    source = [memoryview(content)[:PAGE_BYTES], memoryview(content)[PAGE_BYTES:]]
    write_fully(fd, source, PAGE_BYTES, "write", _at_most(os.pwritev, limit))
    out = _buffers(3 * PAGE_BYTES, PAGE_BYTES, 3 * PAGE_BYTES)
    read_fully(fd, out, PAGE_BYTES, "read", _at_most(os.preadv, limit))
    assert b"".join(out) == content


def test_interrupted_calls_are_repeated(fd: int) -> None:
    write_fully(fd, _buffers(10, fill=b"x"), 0, "write", _interrupted(os.pwritev))
    out = _buffers(10)
    read_fully(fd, out, 0, "read", _interrupted(os.preadv))
    assert bytes(out[0]) == b"x" * 10


@pytest.mark.parametrize("present", [0, 100, PAGE_BYTES, PAGE_BYTES + 100])
def test_read_beyond_the_end_of_the_file_says_how_much_is_missing(fd: int, present: int) -> None:
    os.pwrite(fd, b"x" * present, 0)
    with pytest.raises(CorruptChunk, match=f"ends {2 * PAGE_BYTES - present} bytes too early"):
        read_fully(fd, _buffers(2 * PAGE_BYTES), 0, "read")


def test_write_that_stops_moving_bytes_is_an_error(fd: int) -> None:
    with pytest.raises(StorageError, match="stopped 10 bytes short"):
        write_fully(fd, _buffers(10), 0, "write", lambda *_: 0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_quota_or_file_size_left_is_disk_full(fd: int, code: int) -> None:
    with pytest.raises(DiskFull, match="record 7") as caught:
        write_fully(fd, _buffers(10), 0, "record 7", _failing(code))
    assert caught.value.errno == code


def test_other_errors_are_storage_errors_with_their_number(fd: int) -> None:
    with pytest.raises(StorageError, match="record 7") as caught:
        read_fully(fd, _buffers(10), 0, "record 7", _failing(errno.EIO))
    assert caught.value.errno == errno.EIO
    assert not isinstance(caught.value, DiskFull | CorruptChunk)


def test_probe_for_direct_io_leaves_nothing_behind(tmp_path: Path) -> None:
    supports_direct_io(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_system_that_refuses_direct_io_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "pwritev", _failing(code))
    assert not supports_direct_io(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_probe_in_a_missing_directory_is_refused_with_path_and_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot write in {tmp_path}/none: No such file"):
        supports_direct_io(tmp_path / "none")
