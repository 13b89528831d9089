"""The files of channel blocks: written, found again, and removed."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from offload.errors import ConfigError, CorruptChunk, StorageError
from offload.kernels.sparf import join_codes
from offload.kernels.xxh3 import checksums
from offload.tiers.near.channel_block import Block, BlockFormat
from offload.tiers.pool import page_aligned
from offload.tiers.syscalls import (
    VectoredCall,
    as_storage_error,
    supports_direct_io,
    write_fully,
)
from offload.types import PAGE_BYTES

_SUFFIX = ".kvchan"
_UNFINISHED = ".tmp"


class BlockFiles:
    """The block files of one store, in a directory that it may share with others.

    A file is written once, under a temporary name, and renamed; it is not synced: what a power cut
    leaves of it is told by its checksums. Any thread may call any method, but one at a time
    ``write``.

    Parameters
    ----------
    directory : Path
        Made, for the owner only, if it is missing.
    fmt : BlockFormat
    pwritev : callable

    Attributes
    ----------
    is_direct : bool
        Whether reads and writes bypass the page cache.

    Raises
    ------
    ConfigError
        The directory cannot be made or used.
    """

    def __init__(self, directory: Path, fmt: BlockFormat, pwritev: VectoredCall) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use {directory}: {error.strerror}") from error
        self.is_direct = supports_direct_io(directory)
        self.fmt = fmt
        self._directory = directory
        self._pwritev = pwritev
        self._staging = page_aligned(0)

    def path(self, number: int) -> Path:
        """Return the file of a block."""
        return self._directory / f"{self.fmt.token}-{number:010d}{_SUFFIX}"

    def open(self, number: int) -> int:
        """Return a descriptor to read a block with.

        Raises
        ------
        StorageError
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        path = self.path(number)
        try:
            return os.open(path, flags | (os.O_DIRECT if self.is_direct else 0))
        except OSError as error:
            raise as_storage_error(error, f"cannot open {path}") from error

    def write(self, number: int, parts: Sequence[Block]) -> Block:
        """Join blocks in memory into one, and write that to a file.

        Raises
        ------
        DiskFull
        StorageError
            Nothing is left of the file.
        """
        layout = self.fmt.layout
        pairs = [(part.codes, part.scales) for part in parts if part.codes is not None]
        codes, scales = join_codes(pairs)
        num_tokens = codes.shape[2]
        addresses = codes.ctypes.data + num_tokens * np.arange(self.fmt.num_runs)
        block = Block(
            number,
            parts[0].lane,
            tuple(slot for part in parts for slot in part.slots),
            scales,
            np.mean([part.value_means for part in parts], axis=0, dtype=np.float32),
            self.fmt.header_bytes(num_tokens // layout.chunk_tokens),
            checksums(addresses, num_tokens).reshape(scales.shape),
        )
        num_bytes = self.fmt.file_bytes(len(block.slots))
        if len(self._staging) < num_bytes:
            self._staging = page_aligned(num_bytes)
        image = self._staging[:num_bytes].numpy()
        image[: block.start] = np.frombuffer(self.fmt.pack(block), np.uint8)
        end = block.start + codes.size
        image[block.start : end] = codes.reshape(-1).view(np.uint8)
        image[end:] = 0
        self._store(self.path(number), image.data)
        return block

    def recover(self) -> tuple[list[Block], int]:
        """Return the blocks that are there, oldest first, and how many files were of no use.

        Those, which somebody's crash may have left, are removed.

        Raises
        ------
        StorageError
        """
        name = re.compile(rf"{re.escape(self.fmt.token)}-(\d{{10,}}){_SUFFIX}({_UNFINISHED})?")
        matches = [name.fullmatch(entry) for entry in sorted(os.listdir(self._directory))]
        blocks, num_damaged = [], 0
        for match in filter(None, matches):
            path = self._directory / match[0]
            try:
                if match[2]:
                    raise CorruptChunk(f"{path}: was never finished")
                blocks.append(self._load(path, int(match[1])))
            except CorruptChunk:
                num_damaged += 1
                _unlink(path)
        return sorted(blocks, key=lambda block: block.number), num_damaged

    def unlink(self, blocks: Iterable[Block]) -> None:
        """Remove the files of blocks; they may be gone.

        Raises
        ------
        StorageError
        """
        for block in blocks:
            _unlink(self.path(block.number))

    def _load(self, path: Path, number: int) -> Block:
        try:
            with path.open("rb") as file:
                page, num_bytes = file.read(PAGE_BYTES), os.fstat(file.fileno()).st_size
                num_chunks = self.fmt.num_chunks(page, num_bytes, str(path))
                rest = file.read(self.fmt.header_bytes(num_chunks) - PAGE_BYTES)
        except StorageError:
            raise
        except OSError as error:
            raise as_storage_error(error, f"cannot read {path}") from error
        return self.fmt.parse(page + rest, number, str(path))

    def _store(self, path: Path, image: memoryview) -> None:
        unfinished = path.with_name(path.name + _UNFINISHED)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(unfinished, flags | (os.O_DIRECT if self.is_direct else 0), 0o600)
            try:
                write_fully(fd, [image], 0, str(unfinished), self._pwritev)
            finally:
                os.close(fd)
            os.rename(unfinished, path)
        except StorageError:
            _unlink(unfinished)
            raise
        except OSError as error:
            _unlink(unfinished)
            raise as_storage_error(error, f"cannot write {path}") from error


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise as_storage_error(error, f"cannot remove {path}") from error
