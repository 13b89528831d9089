"""Small block stores, and content that says whose it is."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from offload.plugins.batch import Row
from offload.plugins.block_store import BlockStore
from offload.plugins.namespace import Namespace
from offload.tiers.syscalls import VectoredCall
from offload.types import PAGE_BYTES, round_up
from tests.support.disk import WAIT_S

ROW_BYTES = 5000
"""No whole pages, so that padding is written and must not matter."""
RECORD_BYTES = PAGE_BYTES + round_up(ROW_BYTES)


def make_store(
    root: Path,
    num_slots: int = 8,
    *,
    model: str = "model",
    deadline_s: float = WAIT_S,
    preadv: VectoredCall = os.preadv,
    pwritev: VectoredCall = os.pwritev,
) -> BlockStore:
    """Return a store with room for ``num_slots`` blocks, fewer than 16 of them."""
    return BlockStore(
        root,
        Namespace("test", model, "bfloat16", ROW_BYTES, 16),
        quota_bytes=num_slots * RECORD_BYTES,
        num_threads=2,
        deadline_s=deadline_s,
        preadv=preadv,
        pwritev=pwritev,
    )


def content(name: bytes) -> Row:
    """Return the row of a block."""
    seed = int.from_bytes(name, "big")
    return np.random.default_rng(seed).integers(0, 256, ROW_BYTES, dtype=np.uint8)


def store_blocks(store: BlockStore, names: Sequence[bytes]) -> list[bool]:
    """Store blocks and return which arrived."""
    batch = store.submit_store(names, [content(name) for name in names])
    assert batch.wait(WAIT_S)
    return batch.results


def load_blocks(store: BlockStore, names: Sequence[bytes]) -> list[bool]:
    """Load blocks and return which arrived; what did not must not have changed its row."""
    untouched = np.full(ROW_BYTES, 7, np.uint8)
    rows = [untouched.copy() for _ in names]
    batch = store.submit_load(names, rows)
    assert batch.wait(WAIT_S)
    for name, row, arrived in zip(names, rows, batch.results, strict=True):
        assert np.array_equal(row, content(name) if arrived else untouched)
    return batch.results


def flip_bit(store: BlockStore, slot: int, offset: int) -> None:
    """Invert a bit of a record where it lies."""
    [path] = store.folder.glob("*.kvseg")
    with path.open("r+b") as file:
        file.seek(slot * RECORD_BYTES + offset)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
