"""What is said to a worker and what it answers. Bulk goes by frames of shared memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offload.tiers.near.sparf_settings import SparF
from offload.tiers.segment import Hole
from offload.types import ChunkInfo, ChunkLayout, SlotId

Lane = tuple[int, int]
"""Layer and row of the batch: chunks of a lane are probably read together."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What a worker is started with.

    Attributes
    ----------
    name : str
        In messages.
    directory : Path
        Of its own.
    token : str
        Begins the names of its files, which its successor finds again.
    layout : ChunkLayout
        Of its KV heads.
    fingerprint : bytes
    has_channels : bool
        Whether keys are kept a second time, channel by channel, for SparF.
    block_tokens : int
        Of a block of channels.
    memory_bytes : int
        For the channels of blocks that are not full, and for what was read lately.
    frame_bytes, num_frames : int
        Of the part of the shared memory that holds chunks.
    call_bytes, num_calls : int
        Of the part behind it, for queries and answers.
    num_threads : int
        That attend, and that read and write.
    cpus : tuple of int
        Cores to stay on; all of them if there are none.
    deadline_s : float
    """

    name: str
    directory: Path
    token: str
    layout: ChunkLayout
    fingerprint: bytes
    has_channels: bool
    block_tokens: int
    memory_bytes: int
    frame_bytes: int
    num_frames: int
    call_bytes: int
    num_calls: int
    num_threads: int
    cpus: tuple[int, ...]
    deadline_s: float

    @property
    def shared_bytes(self) -> int:
        """Bytes of the shared memory."""
        return self.frame_bytes * self.num_frames + self.call_bytes * self.num_calls


class TableUpdate(NamedTuple):
    """The chunks of one row of one layer, as a change to what the worker knows of it.

    Attributes
    ----------
    key : int
    kept : int
        Slots, from the first, that are as they were.
    added : ndarray, int64
        What follows them.
    """

    key: int
    kept: int
    added: NDArray[np.int64]


class Write(NamedTuple):
    """Write chunks that lie in frames."""

    slots: Sequence[SlotId]
    infos: Sequence[ChunkInfo]
    lanes: Sequence[Lane]
    frames: Sequence[int]


class Read(NamedTuple):
    """Read chunks into frames."""

    slots: Sequence[SlotId]
    infos: Sequence[ChunkInfo]
    frames: Sequence[int]


class Attend(NamedTuple):
    """Attend with the queries in a call's frame; the answers replace them.

    Attributes
    ----------
    tables : list of TableUpdate
        One for each row of the batch.
    call : int
    num_heads : int
        Query heads of the worker.
    dtype_name : str
        Of the queries.
    scale : float
    how : SparF or None
        None reads everything.
    """

    tables: Sequence[TableUpdate]
    call: int
    num_heads: int
    dtype_name: str
    scale: float
    how: SparF | None


class Adopt(NamedTuple):
    """Take over records of an earlier process."""

    slots: Sequence[SlotId]
    infos: Sequence[ChunkInfo]


class Forget(NamedTuple):
    """Drop chunks and give their space back; answered with what the file system took.

    Attributes
    ----------
    slots : sequence of SlotId
    holes, dead_segments
        As ``SegmentTable.free`` returns them.
    rows : sequence of int
        Names of rows that will not be asked about again.
    """

    slots: Sequence[SlotId]
    holes: Sequence[Hole] = ()
    dead_segments: Sequence[int] = ()
    rows: Sequence[int] = ()


class Ask(NamedTuple):
    """Answered with the worker's counters, a dict."""


Body = Write | Read | Attend | Adopt | Forget | Ask


class Request(NamedTuple):
    """A numbered request."""

    number: int
    body: Body


class Reply(NamedTuple):
    """How a request went: a value, or an error."""

    number: int
    value: Any
    error: Exception | None
