"""Compare every copy of every chunk, on every tier, with what was put there."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from offload.engine import Engine
from offload.errors import CorruptChunk, OffloadError
from offload.runtime import Runtime
from offload.soak_oracle import PlainCache
from offload.soak_tally import Tally
from offload.tiers.faulty import FaultyTier
from offload.tiers.pool import as_chunk, page_aligned
from offload.types import ChunkId

_DEADLINE_S = 60.0
"""Of one read: no fault strikes now, so only a broken machine takes as long."""


def disk_of(engine: Engine) -> FaultyTier:
    """Return the disk tier of an engine that was configured with faults."""
    disk = engine.tiers[-1]
    assert isinstance(disk, FaultyTier)
    return disk


class Audit:
    """Reads every copy of chunks: a damaged record must be refused, all else must be right.

    Nothing is in flight meanwhile, and no fault strikes.

    Parameters
    ----------
    engine : Engine
        Its disk tier is a FaultyTier.
    tally : Tally
        Where the findings go.
    name : str
        Names the round in findings.
    """

    def __init__(self, engine: Engine, tally: Tally, name: str) -> None:
        self._store = engine.store
        self._damaged = disk_of(engine).damaged
        self._tally = tally
        self._name = name

    def check_chunks(self, pairs: Iterable[tuple[Runtime, PlainCache]]) -> None:
        """Compare runtimes that share the engine with what each must hold; there are no others."""
        expected: dict[ChunkId, Tensor] = {}
        for runtime, plain in pairs:
            expected.update(_expected_chunks(runtime, plain))
        for chunk, content in expected.items():
            self._check_chunk(chunk, content)
        forgotten = sorted(set(self._store.table) - set(expected))
        if forgotten:
            self._tally.broken.append(f"{self._name}: chunks {forgotten} belong to nobody")

    def check_runtime(self, runtime: Runtime) -> None:
        """Count references and bytes of the last runtime on its engine."""
        try:
            runtime.check_integrity()
        except AssertionError as error:
            self._tally.broken.append(f"{self._name}: {error}")

    def _check_chunk(self, chunk: ChunkId, expected: Tensor) -> None:
        entry, disk = self._store.table[chunk], len(self._store.tiers) - 1
        if entry.pending is not None:
            found = as_chunk(entry.pending, self._store.layout)
            self._compare(f"chunk {chunk} in a write buffer", found, expected)
        for level, slot in entry.slots.items():
            what = f"chunk {chunk} on {self._store.tiers[level].name}"
            is_damaged = level == disk and slot in self._damaged
            out = page_aligned(self._store.layout.slot_bytes)
            try:
                self._store.tiers[level].read([slot], [entry.info], [out]).wait(_DEADLINE_S)
            except OffloadError as error:
                if is_damaged and isinstance(error, CorruptChunk):
                    self._tally.num_detected += 1
                else:
                    self._tally.lost.append(f"{self._name}: {what}: {error}")
            else:
                found = as_chunk(out, self._store.layout)
                self._compare(what, found, expected, is_damaged=is_damaged)

    def _compare(
        self, what: str, found: Tensor, expected: Tensor, *, is_damaged: bool = False
    ) -> None:
        self._tally.num_chunks += 1
        if is_damaged:
            self._tally.unnoticed.append(f"{self._name}: {what} was damaged, and read all the same")
        elif not torch.equal(found, expected):
            num_wrong = int((found != expected).sum())
            self._tally.wrong.append(f"{self._name}: {what}: {num_wrong} numbers are wrong")


def _expected_chunks(runtime: Runtime, plain: PlainCache) -> Iterator[tuple[ChunkId, Tensor]]:
    """Yield every full chunk of a runtime with what it must hold."""
    size = runtime.engine.layout.chunk_tokens
    for layer, sequence in runtime.layers.items():
        for row, chunks in enumerate(sequence.tables.rows):
            for position, chunk in enumerate(chunks):
                yield chunk, plain.chunk(layer, row, position, size)
