"""Copy chunks from whatever tier holds them into host memory."""

from collections.abc import Sequence

from torch import Tensor

from offload.table import ChunkTable
from offload.tiers.base import Tier
from offload.tiers.pooled import PooledTier
from offload.tiers.transfer import CompletedTransfer, Transfer
from offload.types import ChunkId
from offload.write_queue import settle


def start_read(
    tiers: Sequence[Tier], table: ChunkTable, chunks: Sequence[ChunkId], out: Sequence[Tensor]
) -> Transfer:
    """Begin to copy chunks into host buffers, each from the fastest place that holds it.

    Parameters
    ----------
    tiers : sequence of Tier
    table : ChunkTable
    chunks : sequence of ChunkId
        They must keep their places until the transfer is done.
    out : sequence of Tensor, uint8 [slot_bytes]
        Page-aligned host memory.

    Returns
    -------
    Transfer
        Of what comes from the disk; the rest has been copied.
    """
    settle()  # a copy from the device into host memory may still be on its way
    from_disk: list[int] = []
    for i, (chunk, target) in enumerate(zip(chunks, out, strict=True)):
        entry = table[chunk]
        level = min(entry.slots, default=None)
        if entry.pending is not None:
            target.copy_(entry.pending)
        elif level is not None and isinstance(tiers[level], PooledTier):
            tiers[level].read([entry.slots[level]], [entry.info], [target])
        else:
            from_disk.append(i)
    settle()
    if not from_disk:
        return CompletedTransfer(sum(buffer.numel() for buffer in out))
    disk = len(tiers) - 1
    entries = [table[chunks[i]] for i in from_disk]
    slots = [entry.slots[disk] for entry in entries]
    return tiers[disk].read(slots, [entry.info for entry in entries], [out[i] for i in from_disk])
