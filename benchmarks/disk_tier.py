"""Read and write records through the disk tier, against a bare loop of preadv on the same files.

Both use the same threads and the same bytes per system call, in one run, alternating, and are
reported as medians, because disks drift. The tier verifies every record; the loop verifies none.

    python benchmarks/disk_tier.py [--directory DIR] [--record-kib 16 256 2048] [--json FILE]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from offload.tiers.disk import DiskTier
from offload.tiers.io_plan import Extent, plan_io
from offload.tiers.pool import page_aligned
from offload.tiers.transfer import Transfer
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout, SlotId

_KIB, _MIB, _GB = 1 << 10, 1 << 20, 1e9
_NUM_KV_HEADS, _HEAD_DIM = 8, 128
_TOKEN_BYTES = _NUM_KV_HEADS * 2 * _HEAD_DIM * torch.bfloat16.itemsize
_IN_FLIGHT = 2
"""Groups under way at once, as the prefetching loader has them."""
_WAIT_S = 120.0


@dataclass(frozen=True)
class Timing:
    """One pass over all records."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Row:
    """Medians of one record size; rates count payload bytes."""

    record_kib: int
    op_kib: int
    num_threads: int
    is_direct: bool
    write_gb_s: float
    read_gb_s: float
    raw_gb_s: float
    read_over_raw: float
    read_cpu_s_per_gb: float
    raw_cpu_s_per_gb: float


class Workload:
    """All records of one size in one tier, read and written in groups.

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
        self.num_bytes = self.num_records * layout.slot_bytes
        self.tier = DiskTier(
            directory,
            capacity_bytes=self.num_records * self.record_bytes,
            layout=layout,
            num_threads=num_threads,
            segment_bytes=self.num_records * self.record_bytes,
        )
        self._num_threads = num_threads
        self._directory = directory
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
        return max(op.num_bytes for op in plan_io(extents, self._num_threads))

    def rewrite(self) -> Timing:
        """Free everything and write it again."""
        self.tier.free(self._slots)
        self._slots = self.tier.allocate(self.num_records)
        return _measure(lambda: self._stream(self.tier.write))

    def read(self) -> Timing:
        """Read and verify everything."""
        return _measure(lambda: self._stream(self.tier.read))

    def read_raw(self) -> Timing:
        """Read the same file with a bare loop."""
        [file] = self._directory.iterdir()
        flags = os.O_RDONLY | (os.O_DIRECT if self.tier.is_direct else 0)
        fd, op_bytes, end = os.open(file, flags), self.op_bytes, file.stat().st_size
        buffers = list(page_aligned(self._num_threads * op_bytes).view(self._num_threads, -1))

        def loop(thread: int) -> None:
            buffer = buffers[thread].numpy().data
            for offset in range(thread * op_bytes, end, self._num_threads * op_bytes):
                os.preadv(fd, [buffer], offset)

        try:
            with ThreadPoolExecutor(self._num_threads) as pool:
                return _measure(lambda: list(pool.map(loop, range(self._num_threads))))
        finally:
            os.close(fd)

    def _stream(
        self, call: Callable[[list[SlotId], list[ChunkInfo], list[Tensor]], Transfer]
    ) -> None:
        under_way: deque[Transfer] = deque()
        for number, start in enumerate(range(0, self.num_records, self._group)):
            if len(under_way) == _IN_FLIGHT:
                under_way.popleft().wait(_WAIT_S)
            slots = self._slots[start : start + self._group]
            infos = self._infos[start : start + self._group]
            buffers = list(self._buffers[number % _IN_FLIGHT][: len(slots)])
            under_way.append(call(slots, infos, buffers))
        for transfer in under_way:
            transfer.wait(_WAIT_S)


def _measure(work: Callable[[], object]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def run(directory: Path, record_kib: int, options: argparse.Namespace) -> Row:
    """Measure one record size."""
    work = Workload(directory, record_kib, options.total_mib, options.group_mib, options.threads)
    gb = work.num_bytes / _GB
    writes, reads, raws = [], [], []
    try:
        for _ in range(options.repeats):
            writes.append(work.rewrite())
            reads.append(work.read())
            raws.append(work.read_raw())
        pairs = zip(raws, reads, strict=True)
        return Row(
            record_kib=record_kib,
            op_kib=work.op_bytes // _KIB,
            num_threads=options.threads,
            is_direct=work.tier.is_direct,
            write_gb_s=gb / _median(timing.wall_s for timing in writes),
            read_gb_s=gb / _median(timing.wall_s for timing in reads),
            raw_gb_s=gb / _median(timing.wall_s for timing in raws),
            read_over_raw=_median(raw.wall_s / read.wall_s for raw, read in pairs),
            read_cpu_s_per_gb=_median(timing.cpu_s for timing in reads) / gb,
            raw_cpu_s_per_gb=_median(timing.cpu_s for timing in raws) / gb,
        )
    finally:
        work.tier.close()


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def show(row: Row, out: IO[str]) -> None:
    """Print one line of the table."""
    print(
        f"{row.record_kib:>8} KiB {row.op_kib:>8} KiB {row.write_gb_s:>8.2f} {row.read_gb_s:>8.2f}"
        f" {row.raw_gb_s:>8.2f} {row.read_over_raw:>8.0%} {row.read_cpu_s_per_gb:>8.3f}"
        f" {row.raw_cpu_s_per_gb:>8.3f}",
        file=out,
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--record-kib", type=int, nargs="+", default=[16, 64, 256, 1024, 2048])
    parser.add_argument("--total-mib", type=int, default=512)
    parser.add_argument("--group-mib", type=int, default=32, help="payload of one transfer")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append one line per record size to this file")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the benchmark."""
    options = parse(sys.argv[1:])
    torch.set_num_threads(1)
    print("  record        op        write     read      raw read/raw  read CPU raw CPU")
    print("                           GB/s     GB/s     GB/s            s/GB     s/GB")
    for record_kib in options.record_kib:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            row = run(Path(directory), record_kib, options)
        show(row, sys.stdout)
        if options.json is not None:
            with options.json.open("a") as lines:
                lines.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()
