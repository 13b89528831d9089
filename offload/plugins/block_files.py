"""The files of a store of blocks: a folder that one process has, with records in fixed places."""

import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from offload.errors import ConfigError, CorruptChunk, OffloadError
from offload.plugins.batch import Row
from offload.plugins.namespace import Key, Namespace, info_of, key_in
from offload.tiers.io_plan import MAX_OP_BYTES, Operation
from offload.tiers.record import RecordFormat, raw_record
from offload.tiers.record_header import pack_header, read_info
from offload.tiers.record_io import Place, RecordIo, pages, view
from offload.tiers.segment_files import SegmentFiles
from offload.tiers.syscalls import VectoredCall, as_storage_error, read_fully, write_fully
from offload.types import PAGE_BYTES, ChunkLayout

_LOG = logging.getLogger(__name__)

_SEGMENT_BYTES = 1 << 30
_TOKEN = "blocks"
_ZEROS = memoryview(mmap.mmap(-1, PAGE_BYTES))
"""A page, aligned for the disk; nobody writes to it."""
_QUARANTINE = "quarantine"
_MAX_QUARANTINED = 4
"""Records. They are for whoever wants to know what happened, and count in the quota."""


class BlockFiles:
    """The records of one namespace, in a folder of its own below a root.

    A record is written payload first and header last, over a header of zeros: if the process is
    killed in between there is no record. Neighbours are moved together. Only this class allocates
    memory that the disk reads or writes: page-aligned, and one piece for each thread.

    Parameters
    ----------
    root : Path
    namespace : Namespace
    quota_bytes : int
        Of this namespace: the records, their headers, and what is quarantined.
    preadv, pwritev : callable
        The system calls.

    Raises
    ------
    ConfigError
        The quota is less than one record, the folder cannot be used, or another process has it.
    """

    def __init__(
        self,
        root: Path,
        namespace: Namespace,
        quota_bytes: int,
        preadv: VectoredCall,
        pwritev: VectoredCall,
    ) -> None:
        if namespace.row_bytes < 1:
            raise ConfigError(f"a block has at least one byte, not {namespace.row_bytes}")
        layout = ChunkLayout(1, 1, namespace.row_bytes, 0, torch.uint8)
        self.fmt = RecordFormat(layout, namespace.fingerprint)
        size = self.fmt.record_bytes
        total = quota_bytes // size
        self._max_quarantined = min(_MAX_QUARANTINED, total // 16)
        self.num_slots = total - self._max_quarantined
        if not self.num_slots:
            raise ConfigError(
                f"a quota of {quota_bytes} bytes is less than one block and its header, {size}"
            )
        self._per_segment = max(1, _SEGMENT_BYTES // size)
        self._preadv, self._pwritev = preadv, pwritev
        self.folder = root / namespace.fingerprint.hex()
        self._files = SegmentFiles(self.folder, _TOKEN)
        self._lock_fd = _take(self.folder)
        try:
            self.io = RecordIo(self._files, self.fmt, preadv, pwritev)
            _describe(self.folder, namespace)
            self._trim()
        except BaseException:
            self.close()
            raise
        self._memory = threading.local()

    @property
    def is_direct(self) -> bool:
        """Whether the page cache is bypassed."""
        return self.io.is_direct

    def place(self, slot: int) -> Place:
        """Return segment and index of a slot."""
        return divmod(slot, self._per_segment)

    def buffers(self, n: int) -> list[Row]:
        """Return memory of this thread for ``n`` blocks of one operation, until it asks again."""
        rows: list[Row] | None = getattr(self._memory, "rows", None)
        if rows is None:
            size = self.fmt.layout.slot_bytes
            num_rows = max(1, MAX_OP_BYTES // self.fmt.record_bytes)
            memory = np.frombuffer(mmap.mmap(-1, num_rows * size), np.uint8)
            rows = self._memory.rows = list(memory.reshape(num_rows, size))
        return rows[:n]

    def scan(self, segment: int, scratch: memoryview) -> list[tuple[int, Key]]:
        """Return slot and key of every record that a segment holds; payloads are not read.

        Raises
        ------
        StorageError
        """
        size, header = self.fmt.record_bytes, pages(scratch, 1)[0]
        path = self._files.path(segment)
        num_records = path.stat().st_size // size if path.exists() else 0
        found: list[tuple[int, Key]] = []
        if not num_records:
            return found
        with self._files.open(segment, writing=False, direct=self.io.is_direct) as fd:
            for index in range(min(num_records, self._per_segment)):
                read_fully(fd, [header], index * size, str(path), self._preadv)
                try:
                    key = key_in(read_info(header, self.fmt))
                except CorruptChunk:
                    continue  # a free slot, or one whose header is damaged, which is the same
                found.append((segment * self._per_segment + index, key))
        return found

    @property
    def segments(self) -> range:
        """Numbers of all segments there can be."""
        return range(-(-self.num_slots // self._per_segment))

    def write(
        self, op: Operation, keys: Sequence[Key], payloads: Sequence[Row], scratch: memoryview
    ) -> None:
        """Write neighbouring records; both sequences are in the order of the disk.

        Raises
        ------
        DiskFull, StorageError
            What is in these slots is no record.
        """
        starts, headers = self._starts(op), pages(scratch, len(keys))
        pieces: list[memoryview] = []
        for key, payload, header in zip(keys, payloads, headers, strict=True):
            record = raw_record(self.fmt, info_of(key), payload.data[: self.fmt.payload_bytes])
            header[:] = pack_header(self.fmt, record)
            pieces += [_ZEROS, payload.data]

        def move(fd: int, file: str) -> None:
            write_fully(fd, pieces, starts[0], file, self._pwritev)
            for start, header in zip(starts, headers, strict=True):
                write_fully(fd, [header], start, file, self._pwritev)

        self.io.on_file(op.segment, move, writing=True, is_aligned=True)

    def read(
        self, op: Operation, keys: Sequence[Key], out: Sequence[Row], scratch: memoryview
    ) -> None:
        """Read and verify neighbouring records; both sequences are in the order of the disk.

        Raises
        ------
        CorruptChunk
            One of them, at least, is not what was written.
        StorageError
        """
        members = tuple(range(len(keys)))
        renumbered = Operation(op.segment, op.offset, op.num_bytes, members)
        infos = [info_of(key) for key in keys]
        self.io.read(renumbered, infos, [torch.from_numpy(row) for row in out], scratch)

    def quarantine(self, slot: int, key: Key, scratch: memoryview) -> None:
        """Keep a copy of a damaged record if there is room, and make the slot hold none."""
        segment, index = self.place(slot)
        start, header = index * self.fmt.record_bytes, pages(scratch, 1)[0]
        payload = self.buffers(1)[0]
        try:
            with self._files.open(segment, writing=True, direct=self.io.is_direct) as fd:
                file = str(self._files.path(segment))
                read_fully(fd, [header, payload.data], start, file, self._preadv)
                self._keep(key, header, payload)
                write_fully(fd, [_ZEROS], start, file, self._pwritev)
        except OffloadError as error:
            # Whoever reads it again finds out again.
            _LOG.warning("cannot set block %s aside: %s", key.hex(), error)

    def close(self) -> None:
        """Let another process have the folder. Idempotent."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _starts(self, op: Operation) -> range:
        return range(op.offset, op.offset + op.num_bytes, self.fmt.record_bytes)

    def _keep(self, key: Key, header: memoryview, payload: Row) -> None:
        aside = self.folder / _QUARANTINE
        try:
            aside.mkdir(mode=0o700, exist_ok=True)
            if len(os.listdir(aside)) < self._max_quarantined:
                (aside / f"{key.hex()}.kvrecord").write_bytes(
                    bytes(header) + view(torch.from_numpy(payload))
                )
        except OSError as error:
            raise as_storage_error(error, f"cannot write in {aside}") from error

    def _trim(self) -> None:
        """Give back what a larger quota once allowed."""
        last = len(self.segments)
        for path in self.folder.glob(f"{_TOKEN}-*.kvseg"):
            number = int(path.stem.removeprefix(f"{_TOKEN}-"))
            if number >= last:
                self._files.unlink(number)
            elif number == last - 1:
                most = (self.num_slots - number * self._per_segment) * self.fmt.record_bytes
                os.truncate(path, min(path.stat().st_size, most))


def _take(folder: Path) -> int:
    """Lock a folder for this process, until the descriptor is closed or the process ends."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"{folder} is in use by another engine, and a store of blocks belongs to one: "
            "give every engine a root of its own"
        ) from error
    return fd


def _describe(folder: Path, namespace: Namespace) -> None:
    path = folder / "namespace.json"
    try:
        if not path.exists():
            path.with_suffix(".tmp").write_text(namespace.describe() + "\n")
            path.with_suffix(".tmp").replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
