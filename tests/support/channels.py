"""Small stores of keys by channel, and what they should hold."""

import ctypes
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.kernels.sparf import encode_channels
from offload.tiers.near.channel_runs import Runs
from offload.tiers.near.channel_store import ChannelStore
from offload.tiers.near.channel_table import Found
from offload.tiers.syscalls import VectoredCall
from offload.types import ChunkLayout

LAYOUT = ChunkLayout(2, 16, 8, 4, torch.bfloat16)
TOKEN = "worker-0"
LANE = (3, 0)
BLOCK_CHUNKS = 4
CHUNK_BYTES = 2 * (16 * 8 + 4 * (8 + 4))
"""Of a chunk in memory: codes, scales and the mean of V."""

ALL = np.tile(np.arange(8), (2, 1))
"""Every channel of every head."""

Ints = NDArray[np.int64]


def open_store(
    directory: Path,
    *,
    layout: ChunkLayout = LAYOUT,
    token: str = TOKEN,
    memory_chunks: int = 100,
    preadv: VectoredCall = os.preadv,
    pwritev: VectoredCall = os.pwritev,
) -> ChannelStore:
    """Return a store whose blocks have ``BLOCK_CHUNKS`` chunks of the layout."""
    return ChannelStore(
        directory,
        layout,
        token=token,
        block_tokens=BLOCK_CHUNKS * layout.chunk_tokens,
        memory_bytes=memory_chunks * CHUNK_BYTES,
        preadv=preadv,
        pwritev=pwritev,
    )


def make_keys(slot: int, layout: ChunkLayout = LAYOUT) -> Tensor:
    """Return the keys of a chunk, channels of which differ in size; the same for the same slot."""
    generator = torch.Generator().manual_seed(slot)
    shape = (layout.num_kv_heads, layout.chunk_tokens, layout.key_dim)
    sizes = torch.arange(layout.key_dim) % 3 * 0.7 + 0.1
    return (torch.randn(shape, generator=generator) * sizes).to(layout.dtype)


def make_sums(slot: int, layout: ChunkLayout = LAYOUT) -> NDArray[np.float32]:
    """Return sums of V such that their mean is the slot's number."""
    shape = (layout.num_kv_heads, layout.value_dim)
    return np.full(shape, slot * layout.chunk_tokens, np.float32)


def put(
    store: ChannelStore,
    slots: Sequence[int],
    lanes: tuple[int, int] | Sequence[tuple[int, int]] = LANE,
    layout: ChunkLayout = LAYOUT,
) -> None:
    """Add the chunks of some slots."""
    keys = torch.stack([make_keys(slot, layout) for slot in slots])
    store.add(slots, lanes, keys, np.stack([make_sums(slot, layout) for slot in slots]))


def find(store: ChannelStore, slots: Sequence[int], known: Found | None = None) -> Found:
    return store.find(np.array(slots, np.int64), known)


def codes_of(runs: Runs, column: tuple[int, int], num_tokens: int) -> NDArray[np.int8]:
    """Return ``[num_kv_heads, r, num_tokens]`` of a block and column, from where they lie."""
    block, first = column
    addresses = runs.addresses[block] + first * num_tokens
    codes = [ctypes.string_at(address, num_tokens) for address in addresses.reshape(-1).tolist()]
    return np.frombuffer(b"".join(codes), np.int8).reshape(*addresses.shape, num_tokens)


def assert_holds(
    store: ChannelStore,
    slots: Sequence[int],
    channels: Ints = ALL,
    *,
    found: Found | None = None,
    layout: ChunkLayout = LAYOUT,
) -> None:
    """Check that all of these slots are found, and their keys in what is read of them."""
    found = found or find(store, slots)
    assert found.missing.tolist() == []
    with closing(store.read(found, channels)) as runs:
        places = zip(found.block.tolist(), found.column.tolist(), strict=True)
        codes_of_all = [codes_of(runs, place, layout.chunk_tokens) for place in places]
    for index, slot in enumerate(slots):
        codes, scales = codes_of_all[index], runs.scales[found.block[index]]
        keys = make_keys(slot, layout).float().numpy().swapaxes(1, 2)
        wanted = np.take_along_axis(keys, channels[..., None], 1)
        # Half a step of the chunk's own scale, and half of the block's, which is no less.
        assert (np.abs(codes * scales[..., None] - wanted) <= 1.001 * scales[..., None]).all()
        own = np.take_along_axis(encode_channels(make_keys(slot, layout))[1], channels, 1)
        assert (scales >= own * (1 - 1e-6)).all()


def check_against(store: ChannelStore, expected: Mapping[int, object], unknown: int) -> None:
    """Check that a store holds the keys of these slots, and of no others."""
    slots = sorted(expected)
    assert sorted(store.slots) == slots
    found = find(store, [*slots, unknown])
    assert found.missing.tolist() == [len(slots)]
    assert found.block[-1] == -1
    if slots:
        assert_holds(store, slots)
    store.check_integrity()


def files_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
