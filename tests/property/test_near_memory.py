"""What a worker keeps in memory changes how much is read, and no answer."""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload.tiers.near.attention import RowChunks, ShardAttention
from offload.tiers.near.channel_store import ChannelStore
from offload.tiers.near.piece_cache import PieceCache
from offload.tiers.near.records import ShardRecords
from offload.tiers.near.sparf_settings import SparF
from offload.tiers.pool import as_chunk, page_aligned
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout, Partial, SlotId
from tests.support.near import flip

LAYOUT = ChunkLayout(2, 64, 32, 32, torch.float32)
BLOCK_TOKENS = 2 * LAYOUT.chunk_tokens
NUM_ROWS = 3


class Worker:
    """What one worker consists of, with or without memory for what it has read."""

    def __init__(self, directory: Path, memory_bytes: int, *, keeps: bool) -> None:
        self.directory = directory
        self.memory_bytes = memory_bytes
        self.cache = PieceCache(memory_bytes * keeps, BLOCK_TOKENS)
        self.records = ShardRecords(directory, "worker", LAYOUT)
        self.channels = ChannelStore(
            directory,
            LAYOUT,
            token="worker",
            block_tokens=BLOCK_TOKENS,
            memory_bytes=memory_bytes,
            cache=self.cache,
        )
        self.ahead = ThreadPoolExecutor(1)
        self.attention = ShardAttention(self.records, self.channels, self.cache, self.ahead)
        self.rows: list[list[int]] = [[] for _ in range(NUM_ROWS)]
        self.known = [RowChunks(np.empty(0, np.int64)) for _ in range(NUM_ROWS)]

    def append(self, row: int, slot: int) -> None:
        slots, buffers = [SlotId(slot)], [make_chunk(slot)]
        self.records.write(slots, [ChunkInfo(slot, 0, 0)], buffers)
        self.attention.add_channels(slots, [(0, row)], buffers)
        self._set(row, [*self.rows[row], slot])

    def fork(self, row: int, to: int) -> None:
        self._set(to, list(self.rows[row]))
        self._reclaim()

    def clear(self, row: int) -> None:
        self._set(row, [])
        self._reclaim()

    def damage(self) -> None:
        for path in self.directory.glob("*.kvchan"):
            flip(path, range(PAGE_BYTES, path.stat().st_size, 97))

    def ask(self, row: int, seed: int, how: SparF) -> Partial:
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(LAYOUT.num_kv_heads, 2, LAYOUT.key_dim, generator=generator)
        return self.attention.sparse(query, self.known[row], how)

    def check(self) -> None:
        self.cache.check_integrity()
        self.channels.check_integrity()
        stats = self.channels.stats()
        assert stats["tail_bytes"] + stats["kept_bytes"] <= self.memory_bytes

    def close(self) -> None:
        self.channels.close(remove=True)
        self.records.close()
        self.ahead.shutdown()

    def _set(self, row: int, slots: list[int]) -> None:
        self.rows[row] = slots
        self.known[row] = RowChunks(np.array(slots, np.int64))

    def _reclaim(self) -> None:
        alive = {slot for row in self.rows for slot in row}
        dead = [SlotId(slot) for slot in self.channels.slots if slot not in alive]
        self.channels.forget(dead)
        self.attention.forget(dead)
        self.records.forget(dead, [], [])


def make_chunk(slot: int) -> Tensor:
    """Return a chunk whose codes are the same in any block, with the mean of V of any other.

    So a block that is made again, with other neighbours, steers to the same tokens.
    """
    generator = torch.Generator().manual_seed(slot)
    buffer = page_aligned(LAYOUT.slot_bytes)
    chunk = as_chunk(buffer, LAYOUT)
    torch.rand(chunk.shape, generator=generator, out=chunk).sub_(0.5)
    chunk[:, 0, : LAYOUT.key_dim] = 1
    values = chunk[..., LAYOUT.key_dim :]
    values -= values.mean(1, keepdim=True)
    return buffer


@contextmanager
def two_workers(memory_bytes: int) -> Iterator[tuple[Worker, Worker]]:
    directory = Path(tempfile.mkdtemp(prefix="near-memory-"))
    workers = [Worker(directory / str(keeps), memory_bytes, keeps=keeps) for keeps in (True, False)]
    try:
        yield workers[0], workers[1]
        for worker in workers:
            worker.close()
    finally:
        shutil.rmtree(directory)


ROW = st.integers(0, NUM_ROWS - 1)
ASK = st.tuples(
    st.just("ask"),
    ROW,
    st.integers(0, 3),
    st.builds(SparF, st.integers(1, 16), st.sampled_from([16, 48]), st.sampled_from([16, 32])),
)
CHANGE = st.one_of(
    st.tuples(st.just("append"), ROW),
    st.tuples(st.just("fork"), ROW, ROW),
    st.tuples(st.just("clear"), ROW),
)
MEMORY = st.sampled_from([5_000, 24_000, 60_000, 300_000])


def run(memory_bytes: int, steps: list[tuple], tolerance: float) -> None:  # type: ignore[type-arg]
    with two_workers(memory_bytes) as (ours, plain):
        next_slot = 0
        for row in [0, 0, 0, 0, 1]:
            for worker in (ours, plain):
                worker.append(row, next_slot)
            next_slot += 1
        for name, *arguments in steps:
            if name == "append":
                arguments.append(next_slot)
                next_slot += 1
            if name == "ask" and not ours.rows[arguments[0]]:
                continue
            found = [getattr(worker, name)(*arguments) for worker in (ours, plain)]
            if name == "ask":
                for mine, expected in zip(*found, strict=True):
                    assert float((mine - expected).abs().max()) <= tolerance
            ours.check()
        assert plain.channels.stats()["hits"] == 0


@given(memory_bytes=MEMORY, steps=st.lists(ASK | CHANGE, max_size=30))
@settings(max_examples=40)
def test_answers_with_memory_are_those_without_it_to_the_bit(
    memory_bytes: int,
    steps: list[tuple],  # type: ignore[type-arg]
) -> None:
    run(memory_bytes, steps, 0.0)


@given(
    memory_bytes=MEMORY,
    steps=st.lists(ASK | CHANGE | st.tuples(st.just("damage")), max_size=30),
)
@settings(max_examples=40)
def test_answers_with_memory_are_those_without_it_where_files_are_damaged(
    memory_bytes: int,
    steps: list[tuple],  # type: ignore[type-arg]
) -> None:
    run(memory_bytes, steps, 1e-6)
