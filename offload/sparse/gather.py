"""Copy single token rows out of chunks, wherever the chunks are."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from offload.store import ChunkStore
from offload.tiers.disk import DiskTier
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import as_chunk, page_aligned
from offload.types import ChunkId, round_up


def gather_tokens(
    store: ChunkStore,
    device: torch.device,
    chunks: Sequence[ChunkId],
    heads: Sequence[int],
    ids: Tensor,
) -> Tensor:
    """Return the rows of tokens of one layer, for some of its KV heads.

    Memory tiers are read by row, the disk by head of a chunk, which is what its checksums cover.
    The caller holds the engine's lock.

    Parameters
    ----------
    store : ChunkStore
    device : torch.device
    chunks : sequence of ChunkId
        Full chunks, in order; token ``t`` is in chunk ``t // chunk_tokens``.
    heads : sequence of int
    ids : Tensor, int64 [len(heads), num_tokens]
        On the host. Negative ones are skipped; their rows are zero.

    Returns
    -------
    Tensor, shape (len(heads), num_tokens, row_dim), on ``device``
    """
    layout, size = store.layout, store.layout.chunk_tokens
    out = torch.zeros(*ids.shape, layout.row_dim, dtype=layout.dtype, device=device)
    wanted = ids.numpy()
    lines, places = np.nonzero(wanted >= 0)
    tokens, head_of = wanted[lines, places], np.asarray(heads)[lines]
    positions, offsets = tokens // size, tokens % size
    by_level: dict[int, list[int]] = {}
    slot_of = np.zeros(int(positions.max(initial=-1)) + 1, dtype=np.int64)
    level_of = np.full(len(slot_of), -1)
    for position in np.unique(positions).tolist():
        entry = store.table[chunks[position]]
        level = min(entry.slots, default=len(store.tiers))
        if entry.pending is not None and level >= len(store.tiers) - 1:
            level = len(store.tiers)
        else:
            slot_of[position] = entry.slots[level]
        level_of[position] = level
        by_level.setdefault(level, []).append(position)
    for level, members in by_level.items():
        mine = np.nonzero(level_of[positions] == level)[0]
        at = (head_of[mine], positions[mine], offsets[mine])
        tier = store.tiers[level] if level < len(store.tiers) else None
        if isinstance(tier, MemoryTier):
            rows = _from_pool(tier, slot_of, at, store)
        else:
            rows = _from_records(store, chunks, members, at, is_pending=tier is None)
        index = tuple(torch.from_numpy(part[mine]) for part in (lines, places))
        out[tuple(part.to(out.device) for part in index)] = rows.to(out.device)
    return out


_Places = tuple["np.ndarray", "np.ndarray", "np.ndarray"]
"""Head, position and offset of each token."""


def _from_pool(tier: MemoryTier, slot_of: "np.ndarray", at: _Places, store: ChunkStore) -> Tensor:
    layout = store.layout
    heads, positions, offsets = at
    slots = slot_of[positions]
    elements = tier.pool.slab.view(layout.dtype)
    rows = elements[:, : layout.num_elements].view(
        -1, layout.num_kv_heads * layout.chunk_tokens, layout.row_dim
    )
    line = torch.from_numpy(heads * layout.chunk_tokens + offsets).to(elements.device)
    store.counters.add_loaded(tier.name, len(slots) * layout.row_dim * layout.dtype.itemsize)
    return rows[torch.from_numpy(slots).to(elements.device), line]


def _from_records(
    store: ChunkStore,
    chunks: Sequence[ChunkId],
    members: Sequence[int],
    at: _Places,
    *,
    is_pending: bool,
) -> Tensor:
    """Read the heads of chunks that lie on disk, or wait in a write buffer."""
    layout = store.layout
    heads, positions, offsets = at
    pairs, inverse = np.unique(np.stack([heads, positions], 1), axis=0, return_inverse=True)
    head_bytes = layout.chunk_bytes // layout.num_kv_heads
    stride = round_up(head_bytes)
    memory = page_aligned(len(pairs) * stride).view(len(pairs), stride)
    if is_pending:
        _copy_pending(store, chunks, pairs, memory)
    else:
        _read_heads(store, chunks, pairs, memory[:, :head_bytes])
    rows = memory.view(layout.dtype)[:, : layout.chunk_tokens * layout.row_dim]
    lines = rows.reshape(len(pairs), layout.chunk_tokens, layout.row_dim)
    return lines[torch.from_numpy(inverse.reshape(-1)), torch.from_numpy(offsets)]


def _copy_pending(
    store: ChunkStore, chunks: Sequence[ChunkId], pairs: "np.ndarray", memory: Tensor
) -> None:
    layout = store.layout
    for row, (head, position) in zip(memory, pairs.tolist(), strict=True):
        pending = store.table[chunks[position]].pending
        assert pending is not None
        source = as_chunk(pending, layout)[head].reshape(-1)
        row.view(layout.dtype)[: source.numel()].copy_(source)


def _read_heads(
    store: ChunkStore, chunks: Sequence[ChunkId], pairs: "np.ndarray", memory: Tensor
) -> None:
    """Read one head of each pair's chunk; heads in turn, their reads under way together."""
    tier, disk = store.tiers[-1], len(store.tiers) - 1
    assert isinstance(tier, DiskTier)
    transfers = []
    for head in np.unique(pairs[:, 0]).tolist():
        members = np.nonzero(pairs[:, 0] == head)[0].tolist()
        entries = [store.table[chunks[pairs[i, 1]]] for i in members]
        transfers.append(
            tier.read_heads(
                [entry.slots[disk] for entry in entries],
                [entry.info for entry in entries],
                slice(head, head + 1),
                [memory[i] for i in members],
            )
        )
    for transfer in transfers:
        transfer.wait(store.deadline_s)
        store.counters.add_loaded("disk", transfer.num_bytes)
