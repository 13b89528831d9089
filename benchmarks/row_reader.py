"""How long it takes to find the rows that a step of one layer reads, in memory and from the disk.

One layer of an 8B model (eight KV heads, rows of 512 bytes). Each head reads its best tokens, 1 %
of the context, by scores that change a little from step to step (Gaussian, correlated by
``--memory``), so that some of the tokens are new at each step. In three settings: all chunks in
memory; all on the disk, with lines for a tenth of the keys and values; and that with the tokens
just below the cut prefetched, half as many as are read, while ``--compute-ms`` pass. A wait, if
given, is the longest of a step. The first half of the steps fills the lines and is not counted.

    python -m benchmarks.row_reader [--full] [--wait-us N] [--piece-tokens N] [--directory DIR]
                                   [--json FILE]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from offload.sparse.row_plan import RowMemory, RowPlan
from offload.sparse.row_reader import RowReader
from offload.stats import Counters
from offload.store import ChunkStore
from offload.tiers.disk import DiskTier
from offload.tiers.eviction import KeepFirst
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import page_aligned
from offload.types import PAGE_BYTES, ChunkId, ChunkLayout

LAYOUT = ChunkLayout(8, 64, 128, 128, torch.bfloat16)
HEADS = range(LAYOUT.num_kv_heads)
READ_SHARE = 0.01
LINE_SHARE = 0.1
STAGING_BYTES = 8 << 20
WRITE_BUFFERS = 64

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """Medians over the steps counted, unless said otherwise.

    Attributes
    ----------
    locate_ms, worst_ms : float
        Median and largest.
    new_share : float
        Share of the rows that the step before did not read.
    hit_rate : float
        Of lines.
    reads : float
        Pieces read per step, those of the prefetch included.
    reads_per_s : float
        While at least one thread was reading.
    late_share : float
        Of the rows, those that did not arrive in time.
    hidden_share : float
        Of the time spent reading.
    """

    setting: str
    num_tokens: int
    locate_ms: float
    worst_ms: float
    new_share: float
    hit_rate: float
    reads: float
    reads_per_s: float
    late_share: float
    hidden_share: float


class Layer:
    """The chunks of one layer, all in memory or all on the disk."""

    def __init__(
        self, directory: Path, num_tokens: int, piece_tokens: int | None, *, in_memory: bool
    ) -> None:
        count = num_tokens // LAYOUT.chunk_tokens
        memory = MemoryTier(
            "cpu",
            capacity_bytes=count * LAYOUT.slot_bytes if in_memory else 0,
            layout=LAYOUT,
            device=torch.device("cpu"),
        )
        capacity = count * (PAGE_BYTES + LAYOUT.slot_bytes)
        self.disk = DiskTier(directory, capacity_bytes=capacity, layout=LAYOUT)
        buffers = page_aligned(WRITE_BUFFERS * LAYOUT.slot_bytes).view(WRITE_BUFFERS, -1)
        policies = [KeepFirst(), KeepFirst()]
        self.store = ChunkStore(
            [memory, self.disk], policies, LAYOUT, list(buffers), Counters(), 60.0
        )
        line_bytes = 0 if in_memory else int(LINE_SHARE * count * LAYOUT.chunk_bytes)
        sizes = RowMemory(STAGING_BYTES, line_bytes)
        self.reader = RowReader(
            self.store, torch.device("cpu"), sizes, RowPlan(piece_tokens=piece_tokens)
        )
        piece = torch.randn(1, LAYOUT.num_kv_heads, 4096, LAYOUT.key_dim).bfloat16()
        self.chunks: list[ChunkId] = []
        for first in range(0, num_tokens, 4096):
            self.chunks += [chunk for [chunk] in self.store.put(0, first, piece, piece)]
        self.store.drain()

    def locate(self, ids: Ints, wait_s: float | None) -> Ints:
        return self.reader.locate(0, (0, 0), 0, self.chunks, HEADS, ids, deadline_s=wait_s)

    def prefetch(self, ids: Ints) -> None:
        self.reader.prefetch(0, (0, 0), 0, self.chunks, HEADS, ids)

    def close(self) -> None:
        self.reader.close()
        self.store.close()


def best_tokens(num_tokens: int, num_steps: int, memory: float) -> Iterator[tuple[Ints, Ints]]:
    """Yield what each step reads, and what is just below the cut; the best first."""
    rng, count = np.random.default_rng(1), int(READ_SHARE * num_tokens)
    shape = (len(HEADS), num_tokens)
    scores = rng.standard_normal(shape, dtype=np.float32)
    for _ in range(num_steps):
        fresh = rng.standard_normal(shape, dtype=np.float32)
        scores = memory * scores + (1 - memory**2) ** 0.5 * fresh
        some = np.argpartition(-scores, count + count // 2, axis=1)[:, : count + count // 2]
        order = np.argsort(-np.take_along_axis(scores, some, 1), axis=1)
        ids = np.take_along_axis(some, order, 1)
        yield ids[:, :count], ids[:, count:]


def measure(layer: Layer, setting: str, options: argparse.Namespace) -> Row:
    """Run all steps of one setting."""
    counters, num_steps = layer.store.counters, options.num_steps
    wait_s = None if options.wait_us is None else options.wait_us * 1e-6
    times, new, counted, before = [], [], num_steps // 2, Counters()
    last, busy_s = np.zeros((len(HEADS), 0), dtype=np.int64), 0.0
    for step, (ids, below) in enumerate(best_tokens(options.num_tokens, num_steps, options.memory)):
        if step == num_steps - counted:
            before, busy_s = _copy(counters), layer.disk.reading.total_s
        started = time.perf_counter()
        layer.locate(ids, wait_s)
        times.append(time.perf_counter() - started)
        if "prefetch" in setting:
            layer.prefetch(np.concatenate([ids, below], 1))
            time.sleep(options.compute_ms * 1e-3)
        new.append(1 - _shared(last, ids))
        last = ids
    busy_s = layer.disk.reading.total_s - busy_s
    waited_s = counters.row_wait_s - before.row_wait_s
    lookups, rows = counters.line_lookups - before.line_lookups, counted * last.size
    read_bytes = counters.loaded_bytes.get("disk", 0) - before.loaded_bytes.get("disk", 0)
    reads = read_bytes / (options.piece_tokens * LAYOUT.row_dim * LAYOUT.dtype.itemsize)
    return Row(
        setting=setting,
        num_tokens=options.num_tokens,
        locate_ms=statistics.median(times[-counted:]) * 1e3,
        worst_ms=max(times[-counted:]) * 1e3,
        new_share=statistics.median(new[-counted:]),
        hit_rate=(counters.line_hits - before.line_hits) / lookups if lookups else 1.0,
        reads=reads / counted,
        reads_per_s=reads / busy_s if busy_s else 0.0,
        late_share=(counters.late_rows - before.late_rows) / rows,
        hidden_share=max(0.0, 1 - waited_s / busy_s) if busy_s else 1.0,
    )


def _copy(counters: Counters) -> Counters:
    return Counters(**{**asdict(counters), "loaded_bytes": dict(counters.loaded_bytes)})


def _shared(one: Ints, other: Ints) -> float:
    """Return the share of the tokens of the second that are in the first, too."""
    pairs = zip(one, other, strict=True)
    return sum(len(np.intersect1d(a, b)) for a, b in pairs) / other.size


def report(rows: list[Row]) -> str:
    """Return the table."""
    head = (
        "| setting | tokens | locate, ms | worst | new rows | line hits | reads/step | reads/s "
        "| late | hidden |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [
        f"| {r.setting} | {r.num_tokens} | {r.locate_ms:.2f} | {r.worst_ms:.2f} "
        f"| {r.new_share:.1%} | {r.hit_rate:.1%} | {r.reads:.0f} | {r.reads_per_s:.0f} "
        f"| {r.late_share:.2%} | {r.hidden_share:.0%} |"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="128K tokens instead of 32K")
    parser.add_argument("--num-steps", type=int, default=40)
    parser.add_argument("--memory", type=float, default=0.999, help="correlation of two steps")
    parser.add_argument("--compute-ms", type=float, default=5.0)
    parser.add_argument("--wait-us", type=float, help="longest wait of a step; default: no limit")
    text = "tokens of a head that are read together"
    parser.add_argument("--piece-tokens", type=int, default=LAYOUT.chunk_tokens, help=text)
    parser.add_argument("--directory", type=Path, help="where the disk tier writes")
    parser.add_argument("--json", type=Path, help="write all figures")
    options = parser.parse_args(sys.argv[1:])
    options.num_tokens = 1 << (17 if options.full else 15)
    torch.set_num_threads(1)
    rows = []
    for setting in ("in memory", "on disk", "on disk, prefetch"):
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            in_memory = setting == "in memory"
            layer = Layer(
                Path(directory) / "disk",
                options.num_tokens,
                options.piece_tokens,
                in_memory=in_memory,
            )
            try:
                rows.append(measure(layer, setting, options))
            finally:
                layer.close()
    print(report(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
