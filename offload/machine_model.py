"""The model of the machine that the planner decides by: costs of work, measured at start.

Each measurement takes tens of milliseconds. For the speed of raw bytes see ``bandwidth``; for how
costs change while the cache is used, ``prefetch.rates``.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from offload.bandwidth import PIECE_BYTES, DiskBandwidth, measure_disk, measure_link, wait_for
from offload.errors import ConfigError
from offload.index.base import KeyIndex
from offload.kernels.dispatch import partial_attention
from offload.prefetch.rates import Cost, Rates
from offload.sparse.plan import IndexRecipe
from offload.types import ChunkLayout

_POOL_BYTES: Final = 32 << 20
"""Keys and values that are attended to: more than a core's caches hold."""

_SEGMENT_TOKENS: Final = 1024
_NUM_SEGMENTS: Final = 16
"""Of the index that is searched: one segment, joined with itself so often."""

_SHARE: Final = 0.01
"""Of the context that a search asks for, the default of the sparse policies."""

_GATHERED_TOKENS: Final = 512
_PROBE_BYTES: Final = 16 << 20
_NUM_REPEATS: Final = 5
_LIMIT_S: Final = 0.1
"""For one measurement, on a machine that is busy with other things."""


@dataclass(frozen=True, slots=True)
class MachineModel:
    """What work costs at start, for the chunks of one layout on one device.

    Attributes
    ----------
    layout : ChunkLayout
    device : torch.device
    costs : dict of str to Cost
        By the names of ``prefetch.rates``.
    """

    layout: ChunkLayout
    device: torch.device
    costs: dict[str, Cost]

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token of one layer."""
        return self.layout.chunk_bytes // self.layout.chunk_tokens

    def rates(self) -> Rates:
        """Return rates that start here, for one cache to follow."""
        return Rates(self.costs, self.token_bytes, is_shared=self.device.type == "cpu")


_lock = threading.Lock()
_known: dict[object, MachineModel] = {}
_disks: dict[Path, DiskBandwidth] = {}


def model_machine(
    layout: ChunkLayout,
    group_size: int,
    device: torch.device,
    *,
    index: IndexRecipe | None = None,
    directory: Path | None = None,
) -> MachineModel:
    """Measure what work costs, once in a process for the same arguments.

    Takes a quarter of a second the first time, and a few 10 MiB of memory on host and device
    meanwhile. Any thread may call it; others wait for the one that measures.

    Parameters
    ----------
    layout : ChunkLayout
        Of the chunks of one layer.
    group_size : int
        Heads of the query for each KV head.
    device : torch.device
        Of the model.
    index : IndexRecipe, optional
        What a sparse step searches. Without it ``search`` is not in the model.
    directory : Path, optional
        An existing directory of the disk tier. Without it nothing of a disk is in the model.

    Raises
    ------
    ConfigError
        ``group_size`` is not positive, or the directory cannot be written.
    StorageError
        The disk refused.
    """
    if group_size < 1:
        raise ConfigError(f"a KV head serves {group_size} heads of the query; at least 1 is needed")
    key = (layout, group_size, str(device), repr(index), directory)
    with _lock:
        if key not in _known:
            bench = _Bench(layout, group_size, device)
            costs = bench.memory_costs()
            if index is not None:
                costs["search"] = bench.search_cost(index)
            if directory is not None:
                if directory not in _disks:
                    _disks[directory] = measure_disk(directory, _PROBE_BYTES)
                costs |= disk_costs(layout, _disks[directory])
            _known[key] = MachineModel(layout, device, costs)
        return _known[key]


def disk_costs(layout: ChunkLayout, disk: DiskBandwidth) -> dict[str, Cost]:
    """Return what reading from a disk costs.

    A single token is taken to be read with its head of a chunk, for every KV head: the most that it
    may be; where rows fill pages it is one of these.
    """
    head_bytes = layout.chunk_bytes // layout.num_kv_heads
    per_head_s = max(1 / disk.pieces_per_s, head_bytes / disk.read_bytes_per_s)
    if head_bytes > PIECE_BYTES:
        per_head_s = max(per_head_s, head_bytes / PIECE_BYTES / disk.pieces_per_s)
    return {
        "load.disk": Cost(disk.read_latency_s, 1 / disk.read_bytes_per_s),
        "gather.disk": Cost(disk.read_latency_s, layout.num_kv_heads * per_head_s),
    }


class _Bench:
    """Data in the shape of a layer, and how long work on it takes."""

    def __init__(self, layout: ChunkLayout, group_size: int, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        num_chunks = max(8, _POOL_BYTES // layout.chunk_bytes)
        one = torch.randn(layout.shape).to(layout.dtype)
        self._pool = one.expand(num_chunks, *layout.shape).contiguous()
        heads = layout.num_kv_heads * group_size
        self._query = torch.randn(1, heads, 1, layout.key_dim).to(layout.dtype)

    def memory_costs(self) -> dict[str, Cost]:
        """Return the costs of everything but disk and index."""
        host = torch.device("cpu")
        lift_s, *_ = _least_seconds(self._lift_rows, 1)
        return {
            "attend.gpu": self._attend_cost(self._device),
            "attend.cpu": self._attend_cost(host),
            "gather.gpu": self._gather_cost(self._device),
            "gather.cpu": self._gather_cost(host),
            "load.cpu": Cost(lift_s, 1 / measure_link(self._device)),
        }

    def _attend_cost(self, place: torch.device) -> Cost:
        """Attention to chunks of a pool on a device, and its result on the model's."""
        pool, query = self._pool.to(place), self._query.to(place)
        key_dim = self._layout.key_dim

        def attend(num_chunks: int) -> None:
            rows = pool[None, :num_chunks]
            part = partial_attention(query, rows[..., :key_dim], rows[..., key_dim:], scale=1.0)
            part.out.to(self._device)
            wait_for(self._device)

        return _line(attend, len(pool) // 8, len(pool), self._layout.chunk_tokens)

    def _lift_rows(self, num_rows: int) -> None:
        self._pool[0, 0, :num_rows].to(self._device)
        wait_for(self._device)

    def _gather_cost(self, place: torch.device) -> Cost:
        """Single rows out of a pool, attended to on the model's device."""
        layout = self._layout
        rows = self._pool.to(place).view(-1, layout.row_dim)
        shape = (layout.num_kv_heads, _GATHERED_TOKENS)
        places = torch.randint(len(rows), shape, device=place)
        query = self._query.view(layout.num_kv_heads, -1, layout.key_dim).float().to(self._device)

        def gather(num_tokens: int) -> None:
            wanted = places[:, :num_tokens]
            found = rows.index_select(0, wanted.flatten()).to(self._device).float()
            found = found.view(*wanted.shape, -1)
            weights = torch.bmm(query, found[..., : layout.key_dim].mT).softmax(-1)
            torch.bmm(weights, found[..., layout.key_dim :])
            wait_for(self._device)

        return _line(gather, _GATHERED_TOKENS // 8, _GATHERED_TOKENS, 1)

    def search_cost(self, recipe: IndexRecipe) -> Cost:
        """Return what search and estimate cost with an index of random keys."""
        layout = self._layout
        rows = torch.randn(layout.num_kv_heads, _SEGMENT_TOKENS, layout.row_dim).to(layout.dtype)
        keys, values = rows.split([layout.key_dim, layout.value_dim], -1)
        query = self._query.view(layout.num_kv_heads, -1, layout.key_dim).float()
        query *= layout.key_dim**-0.5
        segment = recipe.build(keys.to(self._device), values.to(self._device), keys.float())
        indexes = {n: segment.join([segment] * n) for n in (1, _NUM_SEGMENTS)}
        query = query.to(self._device)

        def search(num_segments: int) -> None:
            _search(indexes[num_segments], query, layout.value_dim)
            wait_for(self._device)

        return _line(search, 1, _NUM_SEGMENTS, _SEGMENT_TOKENS)


def _search(index: KeyIndex, query: Tensor, value_dim: int) -> None:
    hits = index.search(query, max(1, int(_SHARE * index.num_tokens)))
    values = query.new_zeros(*hits.ids.shape, value_dim)
    index.tail(query, hits, hits.found, values)


def _line(work: Callable[[int], None], few: int, many: int, unit: int) -> Cost:
    """Return the line through how long few and many times ``unit`` take."""
    return line_through((few * unit, many * unit), _least_seconds(work, few, many))


def line_through(amounts: tuple[int, int], seconds: Sequence[float]) -> Cost:
    """Return the cost of work from how long a little and a lot of it took.

    Of the lot, at least half of the time is put down to the amount: it was chosen that large, and
    on a busy machine the little may have taken as long.
    """
    (few, many), (few_s, many_s) = amounts, seconds
    unit_s = max((many_s - few_s) / (many - few), many_s / (2 * many))
    return Cost(max(0.0, many_s - many * unit_s), unit_s)


def _least_seconds(work: Callable[[int], None], *amounts: int) -> list[float]:
    """Return the least of some times for each amount, taken in turns.

    What else goes on in a machine only ever adds, and does so for a while.
    """
    least = [math.inf] * len(amounts)
    end = time.perf_counter() + _LIMIT_S
    for amount in amounts:
        work(amount)
    for _ in range(_NUM_REPEATS):
        for i, amount in enumerate(amounts):
            start = time.perf_counter()
            work(amount)
            least[i] = min(least[i], time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return least
