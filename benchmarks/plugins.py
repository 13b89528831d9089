"""Store and load blocks through the store that vLLM and SGLang use, in MB/s.

The store is closed and opened between the two, so that what is loaded comes from another opening.

    python -m benchmarks.plugins [--directory DIR] [--row-kib 192 2048] [--mib 512] [--json FILE]
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from offload.plugins.block_store import BlockStore
from offload.plugins.namespace import Namespace

_WAIT_S = 600.0


@dataclass(frozen=True)
class Row:
    """Rates count payload bytes; ``open_s`` is the time to find all blocks again."""

    row_kib: int
    num_blocks: int
    store_mb_s: float
    open_s: float
    load_mb_s: float


def measure(directory: Path, row_kib: int, mib: int) -> Row:
    """Store and load as many blocks as make up ``mib``."""
    row_bytes = row_kib << 10
    num_blocks = max(1, (mib << 20) // row_bytes)
    namespace = Namespace("benchmark", "none", "uint8", row_bytes, 16)
    names = [b"%d" % number for number in range(num_blocks)]
    rows = np.random.default_rng(0).integers(0, 256, (num_blocks, row_bytes), dtype=np.uint8)
    quota = 2 * num_blocks * (row_bytes + 8192)
    store = BlockStore(directory, namespace, quota_bytes=quota, deadline_s=_WAIT_S)
    begun = time.perf_counter()
    batch = store.submit_store(names, list(rows))
    assert batch.wait(_WAIT_S)
    store_s = time.perf_counter() - begun
    assert all(batch.results)
    store.close()
    begun = time.perf_counter()
    store = BlockStore(directory, namespace, quota_bytes=quota, deadline_s=_WAIT_S)
    open_s = time.perf_counter() - begun
    found = np.zeros_like(rows)
    begun = time.perf_counter()
    batch = store.submit_load(names, list(found))
    assert batch.wait(_WAIT_S)
    load_s = time.perf_counter() - begun
    store.close()
    assert np.array_equal(found, rows)
    return Row(row_kib, num_blocks, rows.nbytes / 1e6 / store_s, open_s, rows.nbytes / 1e6 / load_s)


def main() -> None:
    """Print a line for each size of a block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    parser.add_argument("--row-kib", type=int, nargs="+", default=[64, 192, 2048])
    parser.add_argument("--mib", type=int, default=256, help="of blocks, for each size")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    args = parser.parse_args()
    rows = []
    for row_kib in args.row_kib:
        with tempfile.TemporaryDirectory(dir=args.directory) as folder:
            rows.append(measure(Path(folder), row_kib, args.mib))
        row = rows[-1]
        print(
            f"{row.row_kib:6d} KiB × {row.num_blocks:5d}: store {row.store_mb_s:6.0f} MB/s, open "
            f"{1e3 * row.open_s:5.0f} ms, load {row.load_mb_s:6.0f} MB/s"
        )
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
