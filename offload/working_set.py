"""How capacities are shared between the pools of chunks and everything else. Pure."""

from dataclasses import dataclass

from offload.errors import CapacityError
from offload.sparse.row_plan import RowMemory, RowPlan
from offload.types import ChunkLayout, round_up

_BUFFER_BYTES = 8 << 20
"""A staging buffer large enough for the disk to reach its bandwidth (measured: flat from 2 MiB)."""

_NUM_BUFFERS = 4
"""One is attended while the others load; with three the disk's queue ran dry now and then."""

_WRITE_BYTES = 16 << 20
"""Write buffers: two bursts of 8 MiB."""

MOST_EXCHANGES = 8
"""Chunks that change places with others at a time: as many are read between two measured steps."""

_HEADS_BYTES = 8 << 20
"""Pieces in flight: 256 of 32 KiB, 10 ms of a disk that reads 27,000 a second; or 2,048 pages."""


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Sizes of what a runtime keeps besides chunks.

    Attributes
    ----------
    num_buffers, buffer_chunks : int
        The staging ring, on the device.
    num_write_buffers : int
        Host buffers for chunks on their way to the disk.
    num_exchanges : int
        Chunks that change places with others at a time, with two host buffers each.
    """

    num_buffers: int
    buffer_chunks: int
    num_write_buffers: int
    num_exchanges: int = 0


def plan_working_set(
    device_capacity_bytes: int | None,
    host_capacity_bytes: int | None,
    slot_bytes: int,
    tail_bytes: int,
    batch: int,
    *,
    num_exchanges: int = 0,
) -> WorkingSet:
    """Choose staging and write buffers.

    Parameters
    ----------
    device_capacity_bytes, host_capacity_bytes : int or None
        None where the cache has no such tier: the buffers then get their full size.
    slot_bytes : int
    tail_bytes : int
        Tails of all layers.
    batch : int
        Rows; a staging buffer must hold one chunk of each.
    num_exchanges : int
        As many as are wanted; there are fewer, but one at least, where their buffers would take
        more than an eighth of the host capacity.

    Raises
    ------
    CapacityError
        The device capacity cannot hold the tails and two staging buffers, or the host capacity not
        two write buffers.
    """
    buffers, chunks = _NUM_BUFFERS, max(batch, _BUFFER_BYTES // slot_bytes)
    if device_capacity_bytes is not None:
        spare = device_capacity_bytes - tail_bytes
        share = min(_BUFFER_BYTES, device_capacity_bytes // 12, spare // 5)
        chunks = max(batch, share // slot_bytes)
        if spare < 2 * buffers * chunks * slot_bytes:  # the pool deserves as much
            buffers, chunks = 2, batch
        needed = tail_bytes + buffers * chunks * slot_bytes
        if needed > device_capacity_bytes:
            raise CapacityError(
                f"gpu capacity {device_capacity_bytes} bytes is below one layer's working set: "
                f"{tail_bytes} bytes of growing chunks and {buffers} staging buffers of "
                f"{chunks * slot_bytes} bytes make {needed}"
            )
    writes = max(2, _WRITE_BYTES // slot_bytes)
    if host_capacity_bytes is not None:
        writes = max(2, min(writes, host_capacity_bytes // 8 // slot_bytes))
        if writes * slot_bytes > host_capacity_bytes:
            raise CapacityError(
                f"cpu capacity {host_capacity_bytes} bytes cannot hold {writes} write buffers of "
                f"{slot_bytes} bytes"
            )
        if num_exchanges:
            num_exchanges = max(1, min(num_exchanges, host_capacity_bytes // 16 // slot_bytes))
    return WorkingSet(buffers, chunks, writes, num_exchanges)


def plan_row_memory(spare_bytes: int | None, layout: ChunkLayout, plan: RowPlan) -> RowMemory:
    """Choose what of the host's capacity is for reading single rows from the disk.

    Parameters
    ----------
    spare_bytes : int or None
        What other buffers leave of the host's capacity; None where the cache has no such tier:
        there are staging buffers then, and no lines.
    layout : ChunkLayout
    plan : RowPlan

    Raises
    ------
    CapacityError
        There is no room for one head of a chunk.
    """
    head_bytes = round_up(layout.chunk_bytes // layout.num_kv_heads)
    staging = max(1, _HEADS_BYTES // head_bytes) * head_bytes
    if spare_bytes is None:
        return RowMemory(staging)
    staging = max(1, min(staging, spare_bytes // 8) // head_bytes) * head_bytes
    if staging > spare_bytes:
        raise CapacityError(
            f"cpu capacity: the {spare_bytes} bytes beside the write buffers cannot hold one head "
            f"of a chunk on its way from the disk, {head_bytes} bytes"
        )
    return RowMemory(staging, int((spare_bytes - staging) * plan.line_share))
