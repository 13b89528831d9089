"""Read a compressed file that nobody vouches for: one zstd frame, a little at a time."""

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, cast

import zstandard

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.syscalls import as_storage_error

MAX_WINDOW_BYTES = 8 << 20
"""What decoders are asked to support at least. We write with 512 KiB."""

_MAX_HEADER_BYTES = 18
_MAX_BLOCK_BYTES = 128 << 10
_BLOCK_HEADER_BYTES, _CHECKSUM_BYTES = 3, 4
_RLE, _RESERVED = 1, 3


class ArchiveStream:
    """The content of a zstd file, from its start to its end. One thread.

    Never holds more than the frame's window and two of its blocks, whatever the file expands to:
    who reads decides how much.

    Parameters
    ----------
    path : Path

    Raises
    ------
    ConfigError
        There is no such file, or it cannot be read.
    CorruptChunk
        It is not one zstd frame, or needs a larger window than ``MAX_WINDOW_BYTES``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)
        try:
            self.num_bytes = os.fstat(self._file.fileno()).st_size
            self.rewind()
        except BaseException:
            self._file.close()
            raise

    def rewind(self) -> None:
        """Start again."""
        self._file.seek(0)
        self._frame = _Frame(self._file, str(self.path))
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._reader = decompressor.stream_reader(cast("BinaryIO", self._frame), closefd=False)
        self._num_read = 0

    def read(self, num_bytes: int) -> bytearray:
        """Return exactly so many bytes; see ``read_into``."""
        content = bytearray(num_bytes)
        self.read_into(memoryview(content))
        return content

    def read_into(self, out: memoryview) -> None:
        """Fill a buffer.

        Raises
        ------
        CorruptChunk
            The file is damaged, or its content ends too early.
        StorageError
        """
        filled = 0
        while filled < len(out):
            count = self._read_some(out[filled:])
            if count == 0:
                raise CorruptChunk(
                    f"{self.path}: the content ends after {self._num_read} bytes, "
                    f"{len(out) - filled} more were expected"
                )
            filled += count

    def finish(self) -> None:
        """Raise CorruptChunk if there is anything left, in the frame or behind it."""
        if self._read_some(memoryview(bytearray(1))):
            raise CorruptChunk(f"{self.path}: the content goes on after {self._num_read - 1} bytes")
        self._frame.finish()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read_some(self, out: memoryview) -> int:
        try:
            count = self._reader.readinto(out)
        except zstandard.ZstdError as error:
            raise CorruptChunk(f"{self.path}: after {self._num_read} bytes: {error}") from error
        self._num_read += count
        return count


class _Frame:
    """A zstd frame (RFC 8878) as a file that ends where the frame does.

    The decompressor does not tell where it stopped, and takes a file that ends inside a frame for
    one that is complete. The headers of the blocks say where they end.
    """

    def __init__(self, file: BinaryIO, what: str) -> None:
        self._file = file
        self._what = what
        self._is_complete = False
        start = self._read(_MAX_HEADER_BYTES)
        if not start.startswith(zstandard.FRAME_HEADER):
            raise CorruptChunk(f"{what} is no zstd file: it starts with {start[:4]!r}")
        try:
            self._header = start[: zstandard.frame_header_size(start)]
            parameters = zstandard.get_frame_parameters(start)
        except zstandard.ZstdError as error:
            raise CorruptChunk(f"{what}: {error}") from error
        if parameters.window_size > MAX_WINDOW_BYTES:
            raise CorruptChunk(
                f"{what} takes {parameters.window_size} bytes of memory to decompress, at most "
                f"{MAX_WINDOW_BYTES} are granted"
            )
        file.seek(len(self._header))
        self._end_bytes = _CHECKSUM_BYTES if parameters.has_checksum else 0

    def read(self, _: int) -> bytes:
        """Return the frame header, then one block at a time, then nothing."""
        if self._header:
            header, self._header = self._header, b""
            return header
        if self._is_complete:
            return b""
        head = self._take(_BLOCK_HEADER_BYTES)
        value = int.from_bytes(head, "little")
        self._is_complete, kind, size = bool(value & 1), value >> 1 & 3, value >> 3
        if kind == _RESERVED or size > _MAX_BLOCK_BYTES:
            raise CorruptChunk(f"{self._what}: a block of type {kind} and {size} bytes")
        end_bytes = self._end_bytes if self._is_complete else 0
        return head + self._take((1 if kind == _RLE else size) + end_bytes)

    def finish(self) -> None:
        """Raise CorruptChunk if the frame has not ended, or the file goes on behind it."""
        if not self._is_complete:
            raise CorruptChunk(f"{self._what}: the frame goes on after its content")
        if self._read(1):
            end = self._file.tell() - 1
            raise CorruptChunk(f"{self._what} goes on after its frame of {end} bytes")

    def _take(self, num_bytes: int) -> bytes:
        content = self._read(num_bytes)
        if len(content) < num_bytes:
            raise CorruptChunk(f"{self._what} ends inside its frame, at byte {self._file.tell()}")
        return content

    def _read(self, num_bytes: int) -> bytes:
        try:
            return self._file.read(num_bytes)
        except OSError as error:
            raise as_storage_error(error, f"read of {self._what}") from error


def _open(path: Path) -> BinaryIO:
    """Open a regular file; a pipe would hang, a device might never end."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigError(f"{path} is not a regular file")
        return os.fdopen(fd, "rb", buffering=_MAX_BLOCK_BYTES)
    except BaseException:
        os.close(fd)
        raise
