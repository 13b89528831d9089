"""Write, read and read single heads through the disk tier, against bare loops of system calls.

A loop has the threads of the tier and its bytes per call, O_DIRECT where the tier has it, and a
fresh file where the tier has one; it verifies nothing and plans nothing. Tier and loop take turns
in every round, the first one second in the next, because disks drift: what counts is the median of
the ratios of the rounds.

    python -m benchmarks.disk_tier [--directory DIR] [--record-kib 256 1024 2048] [--json FILE]
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from offload.machine import read_disk
from offload.tiers.disk import DiskTier
from offload.tiers.io_plan import Extent, plan_io
from offload.tiers.pool import page_aligned
from offload.tiers.transfer import Transfer
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout, SlotId

_KIB, _MIB, _GB = 1 << 10, 1 << 20, 1e9
_NUM_KV_HEADS, _HEAD_DIM = 8, 128
_TOKEN_BYTES = _NUM_KV_HEADS * 2 * _HEAD_DIM * torch.bfloat16.itemsize
_HEAD = 3
"""The one that is read on its own; some way behind its header, like most."""
_IN_FLIGHT = 2
"""Groups under way at once, as the prefetching loader has them."""
_WAIT_S = 120.0
_BARS = {"least_over_raw": 0.8, "most_cpu_s_per_gb": 0.25}


@dataclass(frozen=True)
class Timing:
    """One pass over all records."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Comparison:
    """Medians over the rounds; ``over_raw`` of the ratios. Rates count payload bytes."""

    gb_s: float
    raw_gb_s: float
    over_raw: float
    over_raw_min: float
    over_raw_max: float
    cpu_s_per_gb: float
    raw_cpu_s_per_gb: float


@dataclass(frozen=True)
class Row:
    """One record size."""

    record_kib: int
    op_kib: int
    num_threads: int
    rounds: int
    is_direct: bool
    write: Comparison
    read: Comparison
    read_heads: Comparison


class Workload:
    """All records of one size in one tier, moved in groups.

    Parameters
    ----------
    directory : Path
    record_kib, total_mib, group_mib : int
        Payload of a record, of all records, and of one transfer.
    num_threads : int
    """

    def __init__(
        self, directory: Path, record_kib: int, total_mib: int, group_mib: int, num_threads: int
    ) -> None:
        chunk_tokens = record_kib * _KIB // _TOKEN_BYTES
        layout = ChunkLayout(_NUM_KV_HEADS, chunk_tokens, _HEAD_DIM, _HEAD_DIM, torch.bfloat16)
        self.num_records = total_mib * _MIB // layout.slot_bytes
        self.record_bytes = PAGE_BYTES + layout.slot_bytes
        self.head_bytes = layout.slot_bytes // _NUM_KV_HEADS
        self.num_bytes = self.num_records * layout.slot_bytes
        self.num_threads = num_threads
        self.directory = directory
        self.tier = DiskTier(
            directory,
            capacity_bytes=self.num_records * self.record_bytes,
            layout=layout,
            num_threads=num_threads,
            segment_bytes=self.num_records * self.record_bytes,
        )
        self._group = max(1, group_mib * _MIB // layout.slot_bytes)
        self._infos = [ChunkInfo(i, 0, i * chunk_tokens) for i in range(self.num_records)]
        shape = (_IN_FLIGHT, self._group, layout.slot_bytes)
        self._buffers = page_aligned(shape[0] * shape[1] * shape[2]).view(shape)
        self._buffers.random_(0, 256)
        self._slots: list[SlotId] = []

    @property
    def op_bytes(self) -> int:
        """Bytes of the largest system call the tier makes for one group."""
        size = self.record_bytes
        extents = [Extent(0, i * size, size, 2) for i in range(min(self._group, self.num_records))]
        return max(op.num_bytes for op in plan_io(extents, self.num_threads))

    def renew(self) -> None:
        """Give every record a place in a new file."""
        self.tier.free(self._slots)
        self._slots = self.tier.allocate(self.num_records)

    def write(self) -> None:
        """Checksum and write every record."""
        self._stream(self.tier.write, self.record_bytes - PAGE_BYTES)

    def read(self) -> None:
        """Read and verify every record."""
        self._stream(self.tier.read, self.record_bytes - PAGE_BYTES)

    def read_heads(self) -> None:
        """Read and verify one head of every record."""
        each = self.tier.parts_per_head
        parts = slice(_HEAD * each, (_HEAD + 1) * each)
        self._stream(lambda s, i, out: self.tier.read_parts(s, i, parts, out), self.head_bytes)

    def _stream(
        self,
        call: Callable[[list[SlotId], list[ChunkInfo], list[Tensor]], Transfer],
        num_bytes: int,
    ) -> None:
        under_way: deque[Transfer] = deque()
        for number, start in enumerate(range(0, self.num_records, self._group)):
            if len(under_way) == _IN_FLIGHT:
                under_way.popleft().wait(_WAIT_S)
            slots = self._slots[start : start + self._group]
            infos = self._infos[start : start + self._group]
            buffers = self._buffers[number % _IN_FLIGHT][: len(slots), :num_bytes]
            under_way.append(call(slots, infos, list(buffers)))
        for transfer in under_way:
            transfer.wait(_WAIT_S)


class BareLoops:
    """The same bytes moved by threads that do nothing else.

    Parameters
    ----------
    work : Workload
        Its file is read; written is a new one in the same directory.
    pool : ThreadPoolExecutor
        As many threads as the tier has.
    """

    def __init__(self, work: Workload, pool: ThreadPoolExecutor) -> None:
        self._work = work
        self._pool = pool
        self._direct = os.O_DIRECT if work.tier.is_direct else 0
        self._new = work.directory / "raw"
        memory = page_aligned(work.num_threads * work.op_bytes)
        self._buffers = list(memory.random_(0, 256).view(work.num_threads, -1))

    def renew(self) -> None:
        """Remove the file that was written."""
        self._new.unlink(missing_ok=True)

    def write(self) -> None:
        """Write a file as long as the tier's."""
        self._move(os.pwritev, self._new, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def read(self) -> None:
        """Read the tier's file."""
        [file] = self._work.directory.glob("*.kvseg")
        self._move(os.preadv, file, os.O_RDONLY)

    def read_heads(self) -> None:
        """Read the header and one head of every record, each with a call of its own."""
        work = self._work
        [file] = work.directory.glob("*.kvseg")

        def loop(fd: int, thread: int, buffer: memoryview) -> None:
            header, head = buffer[:PAGE_BYTES], buffer[PAGE_BYTES:][: work.head_bytes]
            for record in range(thread, work.num_records, work.num_threads):
                start = record * work.record_bytes
                os.preadv(fd, [header], start)
                os.preadv(fd, [head], start + PAGE_BYTES + _HEAD * work.head_bytes)

        self._run(loop, file, os.O_RDONLY)

    def _move(
        self, call: Callable[[int, list[memoryview], int], int], file: Path, mode: int
    ) -> None:
        end, op_bytes = self._work.num_records * self._work.record_bytes, self._work.op_bytes

        def loop(fd: int, thread: int, buffer: memoryview) -> None:
            for offset in range(thread * op_bytes, end, self._work.num_threads * op_bytes):
                call(fd, [buffer[: end - offset]], offset)

        self._run(loop, file, mode)

    def _run(self, loop: Callable[[int, int, memoryview], None], file: Path, mode: int) -> None:
        fd = os.open(file, mode | self._direct, 0o600)
        try:
            views = [buffer.numpy().data for buffer in self._buffers]
            list(self._pool.map(lambda thread: loop(fd, *thread), enumerate(views)))
        finally:
            os.close(fd)


@contextmanager
def prepared(
    directory: Path, record_kib: int, options: argparse.Namespace
) -> Iterator[tuple[Workload, BareLoops]]:
    """Open a tier and its rival for one record size."""
    work = Workload(directory, record_kib, options.total_mib, options.group_mib, options.threads)
    try:
        with ThreadPoolExecutor(options.threads) as pool:
            yield work, BareLoops(work, pool)
    finally:
        work.tier.close()


def run(
    directory: Path, record_kib: int, options: argparse.Namespace, progress: "tqdm[Any]"
) -> Row:
    """Measure one record size."""
    timings: dict[str, list[tuple[Timing, Timing]]] = {"write": [], "read": [], "read_heads": []}
    with prepared(directory, record_kib, options) as (work, loops):
        for round_ in range(-1, options.rounds):  # the first one warms up
            for verb, pairs in timings.items():
                if verb == "write":
                    _renew(work, loops)
                sides = {"tier": getattr(work, verb), "raw": getattr(loops, verb)}
                order = ["tier", "raw"] if round_ % 2 else ["raw", "tier"]
                timed = {side: _measure(sides[side]) for side in order}
                if round_ >= 0:
                    pairs.append((timed["tier"], timed["raw"]))
            progress.update()
        gb = {"write": work.num_bytes / _GB, "read": work.num_bytes / _GB}
        gb["read_heads"] = work.num_records * work.head_bytes / _GB
        results = {verb: _compare(timings[verb], gb[verb]) for verb in timings}
        return Row(
            record_kib=record_kib,
            op_kib=work.op_bytes // _KIB,
            num_threads=options.threads,
            rounds=options.rounds,
            is_direct=work.tier.is_direct,
            **results,
        )


def _renew(work: Workload, loops: BareLoops) -> None:
    """Free the space of both files, and have the file system deal with it before the clock runs."""
    work.renew()
    loops.renew()
    os.sync()


def _measure(move: Callable[[], object]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    move()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def _compare(pairs: list[tuple[Timing, Timing]], gb: float) -> Comparison:
    ratios = [raw.wall_s / tier.wall_s for tier, raw in pairs]
    return Comparison(
        gb_s=gb / _median(tier.wall_s for tier, _ in pairs),
        raw_gb_s=gb / _median(raw.wall_s for _, raw in pairs),
        over_raw=_median(ratios),
        over_raw_min=min(ratios),
        over_raw_max=max(ratios),
        cpu_s_per_gb=_median(tier.cpu_s for tier, _ in pairs) / gb,
        raw_cpu_s_per_gb=_median(raw.cpu_s for _, raw in pairs) / gb,
    )


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was run, when, and on what."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks.disk_tier", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "file_system": read_disk(options.directory).file_system,
        "kernel": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg()[0],
        "bars": _BARS,
    }


def show(facts: dict[str, Any], rows: list[Row]) -> None:
    """Print the table."""
    print(f"{facts['command']}\n{facts['date']}, {facts['cores']} cores, {facts['file_system']}, ")
    print(f"{facts['kernel']}, load average at the start {facts['load_average']:.2f}\n")
    print(
        "record KiB  op KiB              GB/s  raw GB/s   over raw (least, most)   CPU s/GB   raw"
    )
    for row in rows:
        for verb in ("write", "read", "read_heads"):
            found: Comparison = getattr(row, verb)
            spread = f"({found.over_raw_min:.0%}, {found.over_raw_max:.0%})"
            print(
                f"{row.record_kib:>10} {row.op_kib:>7}  {verb:<10} {found.gb_s:>7.2f} "
                f"{found.raw_gb_s:>9.2f} {found.over_raw:>10.0%} {spread:<14} "
                f"{found.cpu_s_per_gb:>10.3f} {found.raw_cpu_s_per_gb:>5.3f}"
            )


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--record-kib", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--total-mib", type=int, default=512)
    parser.add_argument("--group-mib", type=int, default=32, help="payload of one transfer")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the benchmark."""
    options = parse(sys.argv[1:])
    torch.set_num_threads(1)
    facts, rows = describe(options), []
    with tqdm(total=len(options.record_kib) * (options.rounds + 1), unit="round") as progress:
        for record_kib in options.record_kib:
            with tempfile.TemporaryDirectory(dir=options.directory) as directory:
                rows.append(run(Path(directory), record_kib, options, progress))
    show(facts, rows)
    if options.json is not None:
        found = {**facts, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
