"""A bounded, checksummed store of blocks on disk, by key, that outlives its process."""

import logging
import os
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from sys import maxsize

from offload.errors import ClosedError, ConfigError, TransferTimeout
from offload.plugins.batch import Batch, Row
from offload.plugins.block_files import BlockFiles
from offload.plugins.mover import BlockStats, Mover, Work
from offload.plugins.namespace import Key, Namespace, key_of
from offload.plugins.slots import Entry, SlotTable
from offload.tiers.io_engine import IoEngine, Job
from offload.tiers.syscalls import VectoredCall

_LOG = logging.getLogger(__name__)

_OPENING_S = 600.0
"""Longest wait for the headers of a store that is opened: a fraction of a millisecond each."""


class BlockStore:
    """Blocks of one size, found by what they are called, on a disk that may fail, lie or hang.

    What is loaded is what was stored under that name in the same namespace, or it is not loaded.
    Nothing blocks but opening, ``drain`` and ``close``: stores and loads are submitted, run on a
    few threads, and are over after ``deadline_s`` at the latest. A disk that has not answered for
    so long is left alone until it does: nothing is found, nothing stored. Any thread may call any
    method.

    A block that cannot be read is forgotten; if it is damaged a copy is set aside. Nothing is
    synced: a killed process loses only what was being written, a power cut may lose more, and
    checksums tell. Other processes cannot open the namespace at the same time.

    Parameters
    ----------
    root : Path
        Made, for its owner only, if it is missing.
    namespace : Namespace
    quota_bytes : int
        Hard limit on what this namespace takes up; the least recently used blocks go first.
    num_threads : int
    deadline_s : float
    preadv, pwritev : callable
        The system calls; replaceable to see what a failing disk does.

    Raises
    ------
    ConfigError
        The folder cannot be used or is in use, or the quota is less than one block.
    StorageError
        What is there cannot be read.
    """

    def __init__(
        self,
        root: Path,
        namespace: Namespace,
        *,
        quota_bytes: int,
        num_threads: int = 4,
        deadline_s: float = 30.0,
        preadv: VectoredCall = os.preadv,
        pwritev: VectoredCall = os.pwritev,
    ) -> None:
        self.namespace = namespace
        self.deadline_s = deadline_s
        self._files = BlockFiles(root, namespace, quota_bytes, preadv, pwritev)
        self._table = SlotTable(self._files.num_slots)
        self._mover = Mover(self._files, self._table)
        self._lock = self._mover.lock
        self._batches: list[Batch] = []
        self._closed = False
        try:
            # The queue holds no memory but the callers', so it needs no bound of its own.
            self._engine = IoEngine(num_threads, max_queued=maxsize, deadline_s=deadline_s)
            self._table.restore(self._find())
        except BaseException:
            self._files.close()
            raise

    @property
    def folder(self) -> Path:
        """Where the files of this namespace are."""
        return self._files.folder

    @property
    def num_blocks(self) -> int:
        """Blocks that are there, or being written."""
        with self._lock:
            return len(self._table)

    @property
    def num_slots(self) -> int:
        """Blocks that the quota has room for."""
        return self._files.num_slots

    @property
    def is_hanging(self) -> bool:
        """Whether the disk has not answered for longer than ``deadline_s``."""
        return self._mover.is_hanging(self.deadline_s)

    @property
    def stats(self) -> BlockStats:
        """What happened so far."""
        with self._lock:
            return replace(self._mover.stats, num_evicted=self._table.num_evicted)

    def holds(self, name: bytes) -> bool:
        """Whether a block can be loaded now. Never blocks, reads nothing."""
        with self._lock:
            return self._table.holds(key_of(name)) and not self.is_hanging

    def touch(self, names: Iterable[bytes]) -> None:
        """Make blocks the most recently used."""
        with self._lock:
            for name in names:
                self._table.touch(key_of(name))

    def submit_store(self, names: Collection[bytes], rows: Sequence[Row]) -> Batch:
        """Start to store blocks; those that are there already are not written again.

        Parameters
        ----------
        names : collection of bytes
        rows : sequence of Row, ``[row_bytes]`` each
            Must not change until the batch is over.

        Raises
        ------
        ConfigError
            The rows do not fit.
        ClosedError
        """
        batch = self._begin(names, rows)
        chosen: list[tuple[int, Entry]] = []
        with self._lock:
            for member, key in enumerate(map(key_of, names)):
                if self._table.touch(key):
                    batch.settle([member], arrived=True)
                elif not self.is_hanging and (entry := self._table.reserve(key)) is not None:
                    chosen.append((member, entry))
                else:
                    self._mover.stats.num_refused += 1
                    batch.settle([member], arrived=False)
        self._start(batch, chosen, self._mover.store, urgent=False)
        return batch

    def submit_load(self, names: Collection[bytes], rows: Sequence[Row]) -> Batch:
        """Start to load blocks; a row changes only once its block was read and verified.

        Parameters and errors are those of ``submit_store``.
        """
        batch = self._begin(names, rows)
        chosen: list[tuple[int, Entry]] = []
        with self._lock:
            for member, key in enumerate(map(key_of, names)):
                entry = None if self.is_hanging else self._table.claim(key)
                if entry is None:
                    batch.settle([member], arrived=False)
                else:
                    chosen.append((member, entry))
        self._start(batch, chosen, self._mover.load, urgent=True)
        return batch

    def poll(self) -> None:
        """Give up what has missed its deadline. Never blocks; call it often."""
        now = time.monotonic()
        with self._lock:
            begun = [batch for batch in self._batches if not batch.is_over]
            self._batches = begun
        for batch in begun:
            if now - batch.begun_s > self.deadline_s:
                self._give_up(batch)

    def drain(self) -> None:
        """Block until every batch is over, ``deadline_s`` at most."""
        with self._lock:
            batches, self._batches = self._batches, []
        for batch in batches:
            if not batch.wait(max(0.0, batch.begun_s + self.deadline_s - time.monotonic())):
                self._give_up(batch)

    def check_integrity(self) -> None:
        """Raise AssertionError if the books do not balance."""
        with self._lock:
            self._table.check_integrity()

    def close(self) -> None:
        """End every batch, then let another process have the namespace. Idempotent.

        Raises
        ------
        TransferTimeout
            The disk hangs. Its threads are left behind, and the folder stays locked.
        """
        with self._lock:
            self._closed = True
        self.drain()
        self._engine.close()
        self._files.close()

    def _find(self) -> Iterable[tuple[int, Key]]:
        """Read the headers of all files."""
        found: list[list[tuple[int, Key]]] = [[] for _ in self._files.segments]

        def scan(segment: int, scratch: memoryview) -> None:
            found[segment] = self._files.scan(segment, scratch)

        jobs: list[Job] = [partial(scan, segment) for segment in self._files.segments]
        futures = self._engine.submit(jobs, urgent=True, what=f"opening {self.folder}")
        _, pending = wait(futures, timeout=_OPENING_S)
        if pending:
            raise TransferTimeout(f"{self.folder} was not read within {_OPENING_S} s")
        for future in futures:
            future.result()
        return (each for segment in found for each in segment)

    def _begin(self, names: Collection[bytes], rows: Sequence[Row]) -> Batch:
        size = self.namespace.row_bytes
        if len(names) != len(rows) or any(row.shape != (size,) for row in rows):
            shapes = sorted({row.shape for row in rows})
            raise ConfigError(
                f"{len(names)} blocks of {size} bytes do not fit {len(rows)} rows of {shapes}"
            )
        batch = Batch(rows)
        with self._lock:
            if self._closed:
                raise ClosedError(f"the block store {self.folder} is closed")
            self._batches = [each for each in self._batches if not each.is_over]
            self._batches.append(batch)
        return batch

    def _start(
        self, batch: Batch, chosen: Sequence[tuple[int, Entry]], work: Work, *, urgent: bool
    ) -> None:
        if not chosen:
            return
        ops = self._files.io.plan(
            [self._files.place(entry.slot) for _, entry in chosen], self._engine.num_threads
        )
        jobs: list[Job] = []
        for op in ops:
            members = [chosen[number][0] for number in op.members]
            entries = [chosen[number][1] for number in op.members]
            jobs.append(partial(self._mover.run, work, batch, members, entries, op))
        self._engine.submit(jobs, urgent=urgent, what=f"blocks of {self.folder}")

    def _give_up(self, batch: Batch) -> None:
        num_open = batch.give_up()
        with self._lock:
            self._mover.stats.num_given_up += num_open
        _LOG.warning(
            "block store: %d blocks of %s given up after %.3g s: the disk is too slow, or hangs",
            num_open,
            self.folder,
            self.deadline_s,
        )
