"""Parts of records whose units are not what is asked for: encoded ones, or longer ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from offload.tiers.buffers import Buffer
from offload.tiers.pool import page_aligned
from offload.tiers.record import Stored, check_units
from offload.tiers.record_codec import decode_units
from offload.tiers.record_fill import NO_SPILL, fill
from offload.tiers.record_io import Place, RecordIo, view
from offload.tiers.record_part import Part
from offload.tiers.record_seal import open_units
from offload.types import PAGE_BYTES, round_up


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Units of one record that some parts lie in, and where in the job's memory they go."""

    place: Place
    stored: Stored
    first: int
    end: int
    start: int

    @property
    def lead(self) -> int:
        """Bytes before the first unit in its page."""
        return self.stored.starts[self.first] % PAGE_BYTES

    @property
    def num_bytes(self) -> int:
        """Whole pages."""
        return round_up(self.lead + self.stored.starts[self.end] - self.stored.starts[self.first])


def read_runs(io: RecordIo, parts: Sequence[tuple[Part, Stored]], scratch: memoryview) -> None:
    """Fill buffers with parts of records by way of the units that they lie in, each read once.

    Parameters
    ----------
    io : RecordIo
    parts : sequence of (Part, Stored)
        Of one segment, in disk order; with what their headers say.
    scratch : memoryview

    Raises
    ------
    CorruptChunk
    StorageError
    """
    fmt = io.fmt
    row_bytes = fmt.unit_bytes // fmt.unit_tokens
    runs: dict[tuple[Place, int, int], _Run] = {}
    wanted: list[tuple[Part, _Run, int]] = []
    total = 0
    for part, stored in parts:
        first_token, tokens = part.first * fmt.unit_tokens, stored.unit_tokens
        first = first_token // tokens
        end = -(-(first_token + part.out.nbytes // row_bytes) // tokens)
        run = runs.get((part.place, first, end))
        if run is None:
            run = runs[part.place, first, end] = _Run(part.place, stored, first, end, total)
            total += run.num_bytes
        wanted.append((part, run, (first_token - first * tokens) * row_bytes))
    rows = _decoded(io, list(runs.values()), _memory(total, scratch))
    for part, run, skipped in wanted:
        part.out.bytes[:] = rows[run][skipped : skipped + part.out.nbytes]


def _decoded(io: RecordIo, runs: Sequence[_Run], memory: Buffer) -> dict[_Run, memoryview]:
    """Read runs of units, verify and decode them; units of one kind together."""
    fmt = io.fmt
    pieces = []
    for run in runs:
        offset = io.start_of(run.place) + PAGE_BYTES + run.stored.starts[run.first] - run.lead
        pieces.append((offset, memory.part(run.start, run.num_bytes)))
    fill(io, runs[0].place[0], pieces, NO_SPILL)
    kinds: dict[tuple[int, int], list[_Run]] = {}
    for run in runs:
        kinds.setdefault((run.stored.codec, run.stored.unit_tokens), []).append(run)
    rows: dict[_Run, memoryview] = {}
    for (codec, tokens), alike in kinds.items():
        units = [unit for run in alike for unit in _verified_units(io, run, memory)]
        unit_bytes = fmt.unit(tokens).num_bytes
        out = torch.empty(len(units) * unit_bytes, dtype=torch.uint8)
        decode_units(fmt, codec, tokens, units, out, io.meter)
        decoded, start = view(out), 0
        for run in alike:
            stop = start + (run.end - run.first) * unit_bytes
            rows[run], start = decoded[start:stop], stop
    return rows


def _verified_units(io: RecordIo, run: _Run, memory: Buffer) -> list[memoryview]:
    fmt = io.fmt
    starts = run.stored.starts[run.first : run.end + 1]
    base = run.start + run.lead
    check_units(memory.bytes[base : base + starts[-1] - starts[0]], fmt, run.stored, run.first)
    base -= starts[0]
    units = [memory.bytes[base + start : base + end] for start, end in pairwise(starts)]
    if run.stored.seal is not None:
        open_units(fmt, run.stored, units, run.first, io.where(run.place))
    return units


def _memory(num_bytes: int, scratch: memoryview) -> Buffer:
    """Return so much page-aligned memory, the scratch of the thread if it is large enough."""
    if num_bytes <= len(scratch):
        return Buffer(np.frombuffer(scratch, np.uint8).ctypes.data, scratch)
    return Buffer.of(page_aligned(num_bytes))
