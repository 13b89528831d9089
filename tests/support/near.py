"""Small tiers that attend beside the disk, what they hold, and processes that come to an end."""

import os
import select
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.kernels.reference import partial_attention
from offload.tiers.near.disk import NearDisk
from offload.tiers.near.launching import Launcher
from offload.tiers.near.link import WorkerLink
from offload.tiers.near.member import Row
from offload.tiers.near.messages import Adopt, Ask
from offload.tiers.near.place import places
from offload.tiers.near.settings import NearSettings
from offload.tiers.pool import as_chunk, page_aligned
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout, Partial, SlotId
from tests.support.disk import WAIT_S

LAYOUT = ChunkLayout(2, 64, 32, 32, torch.float32)
SCALE = LAYOUT.key_dim**-0.5
IMPATIENT_S = 0.2
GROUP_SIZE = 2
"""Query heads of a KV head."""

HALF_RECORD = PAGE_BYTES + LAYOUT.slot_bytes // 2
"""What each of two workers writes of a chunk."""


@contextmanager
def held_launcher() -> Iterator[None]:
    """Keep the launcher, so that what is started meanwhile does not have to load it again."""
    Launcher.acquire()
    try:
        yield
    finally:
        Launcher.release()


def make_near(
    directory: Path,
    num_slots: int = 64,
    layout: ChunkLayout = LAYOUT,
    *,
    num_paths: int = 1,
    has_channels: bool = False,
    deadline_s: float = WAIT_S,
    **settings: float,
) -> NearDisk:
    """Return a tier of exactly ``num_slots`` slots, with two threads in each worker."""
    folders = [directory / f"path-{number}" for number in range(num_paths)]
    chosen = NearSettings(**{"num_threads": 2, **settings})  # type: ignore[arg-type]
    shares = places(folders, layout, chosen.workers_per_path)
    return NearDisk(
        folders,
        capacity_bytes=num_slots * sum(place.slot_cost(has_channels) for place in shares),
        layout=layout,
        has_channels=has_channels,
        settings=chosen,
        fingerprint=b"model",
        deadline_s=deadline_s,
    )


@contextmanager
def two_workers(directory: Path) -> Iterator[NearDisk]:
    """Open a tier with channels, a block of which is full after two chunks."""
    opened = make_near(directory, num_paths=2, has_channels=True, block_tokens=128)
    with closing(opened):
        yield opened
        opened.check_integrity()


@dataclass(frozen=True, slots=True)
class Held:
    """Chunks that a tier was given, by row of a batch.

    Attributes
    ----------
    infos : list of list of ChunkInfo
    slots : ndarray, int64 [num_rows, num_chunks]
    buffers : list of list of Tensor, uint8 [slot_bytes]
    chunks : Tensor, shape (num_rows, num_chunks, num_kv_heads, chunk_tokens, row_dim)
    """

    infos: list[list[ChunkInfo]]
    slots: NDArray[np.int64]
    buffers: list[list[Tensor]]
    chunks: Tensor

    def rows(self, *numbers: int) -> list[Row]:
        """Return what is asked for some of the rows; all of them if none is named."""
        return [(row, self.slots[row]) for row in numbers or range(len(self.slots))]

    def flat_slots(self, row: int) -> list[SlotId]:
        return [SlotId(slot) for slot in self.slots[row].tolist()]


def fill(
    disk: NearDisk, num_rows: int = 2, num_chunks: int = 4, *, layer: int = 0, seed: int = 0
) -> Held:
    """Write chunks of random numbers as a cache would: by position, and then by row."""
    layout, rng = disk.layout, torch.Generator().manual_seed(seed)
    count = num_rows * num_chunks
    buffers = list(page_aligned(count * layout.slot_bytes).view(count, layout.slot_bytes))
    for buffer in buffers:
        as_chunk(buffer, layout).copy_(torch.randn(layout.shape, generator=rng))
    ids = [1000 * seed + 100 * layer + number for number in range(count)]
    tokens = [number // num_rows * layout.chunk_tokens for number in range(count)]
    infos = [ChunkInfo(name, layer, token) for name, token in zip(ids, tokens, strict=True)]
    slots = disk.allocate(count, layer)
    disk.write(slots, infos, buffers).wait(WAIT_S)
    by_row = [range(row, count, num_rows) for row in range(num_rows)]
    chunks = [torch.stack([as_chunk(buffers[i], layout) for i in row]) for row in by_row]
    return Held(
        [[infos[i] for i in row] for row in by_row],
        np.array([[slots[i] for i in row] for row in by_row], np.int64),
        [[buffers[i] for i in row] for row in by_row],
        torch.stack(chunks),
    )


def draw_query(
    num_rows: int = 2, layout: ChunkLayout = LAYOUT, group_size: int = GROUP_SIZE, seed: int = 9
) -> Tensor:
    """Draw ``[num_rows, num_heads, key_dim]`` of the layout's dtype."""
    shape = num_rows, layout.num_kv_heads * group_size, layout.key_dim
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(layout.dtype)


def exact(query: Tensor, chunks: Tensor, layout: ChunkLayout = LAYOUT) -> Partial:
    """Attend to ``[num_rows, num_chunks, num_kv_heads, chunk_tokens, row_dim]`` in float32."""
    keys, values = chunks.float().split([layout.key_dim, layout.value_dim], -1)
    asked = query.float().unsqueeze(2)
    part = partial_attention(asked, keys, values, scale=layout.key_dim**-0.5)
    return Partial(part.out[:, :, 0], part.lse[:, :, 0])


def largest_error(found: Partial, expected: Partial) -> float:
    """Return the largest absolute difference of any output or log-sum-exp."""
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def check_attends(disk: NearDisk, held: Held, *rows: int, most: float = 1e-5) -> None:
    """Ask about some of the rows, or all, and compare with exact attention."""
    numbers = list(rows or range(len(held.slots)))
    query = draw_query(len(held.slots), disk.layout)[numbers]
    found = disk.attend(query, held.rows(*numbers), SCALE).wait(WAIT_S)
    assert largest_error(found, exact(query, held.chunks[numbers], disk.layout)) <= most


def check_reads(disk: NearDisk, held: Held, row: int) -> None:
    """Fetch the chunks of a row, and compare with what was written."""
    layout = disk.layout
    out = [page_aligned(layout.slot_bytes) for _ in held.buffers[row]]
    disk.read(held.flat_slots(row), held.infos[row], out).wait(WAIT_S)
    pairs = zip(out, held.buffers[row], strict=True)
    assert all(torch.equal(a[: layout.chunk_bytes], b[: layout.chunk_bytes]) for a, b in pairs)


def num_restarts(disk: NearDisk) -> list[int]:
    return [member.link.num_restarts for member in disk.members]


def kill(link: WorkerLink) -> None:
    os.kill(link.pid, signal.SIGKILL)


def stop(link: WorkerLink) -> None:
    """Make a worker hang."""
    os.kill(link.pid, signal.SIGSTOP)


def hang(link: WorkerLink) -> None:
    """Stop a worker, and take the patience from its link, until another worker takes over."""
    usual, adopt, is_stopped = link._patience_s, link._adopt, threading.Event()

    def adopt_patiently() -> Adopt:
        link._patience_s = usual
        return adopt()

    def stop_now(_: object) -> None:
        link._patience_s = IMPATIENT_S
        stop(link)
        is_stopped.set()

    link._adopt = adopt_patiently
    # On the thread that listens, which else would not notice for as long as it was patient.
    stop(link)
    asked = link.ask("disk: counters", lambda _: Ask())
    asked.add_done_callback(stop_now)
    os.kill(link.pid, signal.SIGCONT)
    assert is_stopped.wait(WAIT_S)


def files_of(disk: NearDisk, suffix: str, member: int = 0) -> list[Path]:
    """Return the files of a worker, oldest first."""
    return sorted(disk.members[member].link.config.directory.glob(f"*{suffix}"))


def flip(path: Path, offsets: Iterable[int]) -> None:
    """Change one bit at each of some offsets; doing it again undoes it."""
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x10]))


def wait_gone(pids: Sequence[int], timeout_s: float = WAIT_S) -> None:
    """Wait until processes have ended."""
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([fd], [], [], timeout_s)[0], f"process {pid} is still there"
        finally:
            os.close(fd)
