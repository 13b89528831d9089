"""Every Triton kernel on a layer of Llama-3.1-8B, against how fast the device copies.

8 KV heads of 128 channels in bfloat16, groups of 4. A kernel's rate is the bytes that it has to
move over its median time, with a cold cache; its limit is a plain copy, measured in the same run:
within device memory (bytes read plus bytes written), or from page-locked memory over the bus.

    python -m benchmarks.gpu_kernels [--tokens N] [--json FILE]

Needs a CUDA device and triton. Without, it says so and measures nothing.
"""

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Limit = Literal["device", "bus"]

_NUM_HEADS, _GROUP, _DIM, _CHUNK_TOKENS = 8, 4, 128, 64
_ROW_BYTES = 2 * _DIM * torch.bfloat16.itemsize
_TOKENS_PER_CLUSTER = 32
_SCALE = _DIM**-0.5


class Case(NamedTuple):
    """One kernel at work: what it moves, and what bounds how fast."""

    name: str
    num_bytes: int
    limit: Limit
    run: Callable[[], object]


class Row(NamedTuple):
    """One measurement; ``of_limit`` is the share of the rate of a plain copy."""

    name: str
    num_bytes: int
    limit: Limit
    ms: float
    gb_s: float
    of_limit: float


def make_cases(device: str, num_tokens: int) -> Iterator[Case]:
    """Yield every case over a context of so many tokens; its memory is held until the next."""
    yield from _attention(device, num_tokens)
    yield from _quantised_attention(device, num_tokens)
    yield from _row_attention(device, num_tokens)
    yield from _scan(device, num_tokens)
    yield from _bounds(device, num_tokens)
    yield from _gathers(device, num_tokens)


def _chunks(device: str, num_tokens: int) -> Tensor:
    shape = (1, num_tokens // _CHUNK_TOKENS, _NUM_HEADS, _CHUNK_TOKENS, 2 * _DIM)
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _query(device: str) -> Tensor:
    return torch.randn(1, _NUM_HEADS * _GROUP, 1, _DIM, device=device, dtype=torch.bfloat16)


def _attention(device: str, num_tokens: int) -> Iterator[Case]:
    from offload.kernels.triton_chunks import attend_chunks

    query, pool = _query(device), _chunks(device, num_tokens)
    keys, values = pool.split(_DIM, -1)
    slots = torch.randperm(pool.shape[1], device=device).unsqueeze(0)
    yield Case(
        "attention, all chunks of a view",
        pool.nbytes,
        "device",
        partial(attend_chunks, query, keys, values, scale=_SCALE),
    )
    yield Case(
        "attention, all slots in any order",
        pool.nbytes,
        "device",
        partial(attend_chunks, query, keys, values, scale=_SCALE, slots=slots),
    )
    few = slots[:, : max(1, slots.shape[1] // 16)]
    yield Case(
        "attention, one slot in 16",
        pool.nbytes * few.shape[1] // slots.shape[1],
        "device",
        partial(attend_chunks, query, keys, values, scale=_SCALE, slots=few),
    )


def _quantised_attention(device: str, num_tokens: int) -> Iterator[Case]:
    from offload.kernels.quantised import Bits, quantise
    from offload.kernels.triton_quantised import attend_quantised

    query, pool = _query(device), _chunks(device, num_tokens)
    widths: tuple[Bits, ...] = (8, 4)
    for num_bits in widths:
        keys, values = (quantise(part, num_bits) for part in pool.split(_DIM, -1))
        yield Case(
            f"attention, {num_bits} bits",
            sum(part.nbytes for part in (*keys, *values)),
            "device",
            partial(attend_quantised, query, keys, values, scale=_SCALE),
        )


def _row_attention(device: str, num_tokens: int) -> Iterator[Case]:
    from offload.kernels.triton_rows import addresses_of, attend_rows

    query = _query(device)
    near = torch.randn(_NUM_HEADS, num_tokens, 2 * _DIM, dtype=torch.bfloat16, device=device)
    for limit, rows in _near_and_far(near):
        for divisor in (100, 10):
            tokens = torch.randperm(num_tokens)[: num_tokens // divisor]
            addresses = addresses_of(rows)[None, :, tokens].to(device)
            yield Case(
                f"attention, 1 token in {divisor} by address, {limit}",
                addresses.numel() * _ROW_BYTES,
                limit,
                partial(attend_rows, query, addresses, _DIM, scale=_SCALE),
            )


def _scan(device: str, num_tokens: int) -> Iterator[Case]:
    from offload.kernels.codes import encode
    from offload.kernels.scan import ScanTables
    from offload.kernels.triton_clusters import choose_clusters, score_clusters
    from offload.kernels.triton_places import score_places

    num_clusters = num_tokens // _TOKENS_PER_CLUSTER
    shape = (_NUM_HEADS, num_clusters)
    codes = encode(torch.randn(_NUM_HEADS, num_tokens, _DIM, device=device), 2, unbiased=True)
    ones = torch.ones(shape, dtype=torch.bfloat16, device=device)
    numbers = torch.randint(-127, 128, (*shape, _DIM), dtype=torch.int8, device=device)
    counts = torch.full(shape, _TOKENS_PER_CLUSTER, dtype=torch.int16, device=device)
    signs = torch.zeros(_NUM_HEADS, num_tokens // 16, 16, 4, dtype=torch.uint8, device=device)
    basis = torch.zeros(_NUM_HEADS, 1, 32, _DIM, dtype=torch.float16, device=device)
    tables = ScanTables(
        numbers, ones / 500, numbers, ones, counts, ones, ones, *codes, signs, codes.scale, basis,
        sizes=((num_tokens, num_clusters),), num_bits=2, share=0.6,
    )  # fmt: skip
    owner = torch.arange(num_tokens, dtype=torch.int32, device=device) // _TOKENS_PER_CLUSTER
    owner = owner.expand(_NUM_HEADS, -1).contiguous()
    query = torch.randn(_NUM_HEADS, _GROUP, _DIM, device=device)
    logits, hoped = score_clusters(tables, query)
    budget = num_tokens // 100
    chosen = choose_clusters(tables, hoped, budget, "max")
    written = 4 * _NUM_HEADS * _GROUP
    yield Case(
        "scan, clusters",
        numbers.nbytes + 6 * counts.numel() + 2 * written * num_clusters,
        "device",
        partial(score_clusters, tables, query),
    )
    yield Case(
        "scan, choice (softmax and cut)",
        3 * written * num_clusters + counts.nbytes + chosen.nbytes,
        "device",
        partial(choose_clusters, tables, hoped, budget, "max"),
    )
    yield Case(
        "scan, places",
        int(tables.share * (codes.bits.nbytes + codes.scale.nbytes))
        + owner.nbytes
        + written * num_tokens,
        "device",
        partial(score_places, tables, owner, query, logits, chosen),
    )


def _bounds(device: str, num_tokens: int) -> Iterator[Case]:
    from offload.kernels.triton_bounds import bound_chunks, score_boxes

    keys = torch.randn(_NUM_HEADS, num_tokens, _DIM, dtype=torch.bfloat16, device=device)
    query = torch.randn(_NUM_HEADS, _GROUP, _DIM, device=device)
    lower, upper = bound_chunks(keys, 16)
    yield Case(
        "bounds of chunks of 16",
        keys.nbytes + lower.nbytes + upper.nbytes,
        "device",
        partial(bound_chunks, keys, 16),
    )
    yield Case(
        "scores of bounds",
        lower.nbytes + upper.nbytes + 4 * query.shape[1] * lower.shape[0] * lower.shape[1],
        "device",
        partial(score_boxes, query, lower, upper),
    )


def _gathers(device: str, num_tokens: int) -> Iterator[Case]:
    from offload.kernels.triton_gather import gather_rows
    from offload.kernels.triton_rows import addresses_of

    for row_bytes in (_ROW_BYTES, 64 << 10):
        num_rows = num_tokens * _ROW_BYTES // row_bytes
        near = torch.randint(0, 256, (2 * num_rows, row_bytes), dtype=torch.uint8, device=device)
        for limit, rows in _near_and_far(near):
            out = torch.empty(num_rows, row_bytes, dtype=torch.uint8, device=device)
            order = torch.randperm(2 * num_rows)[:num_rows]
            addresses = addresses_of(rows)[order].to(device)
            slots = torch.randperm(num_rows, device=device)
            yield Case(
                f"gather, rows of {row_bytes} B, {limit}",
                out.nbytes * (2 if limit == "device" else 1),
                limit,
                partial(gather_rows, addresses, slots, out),
            )


def _near_and_far(near: Tensor) -> list[tuple[Limit, Tensor]]:
    """Return rows in device memory, and the same in page-locked memory."""
    far = near.cpu().pin_memory() if near.is_cuda else near
    return [("device", near), ("bus", far)]


def measure(cases: Iterator[Case], limits: dict[Limit, float]) -> list[Row]:
    """Time each case on the device; ``limits`` in GB/s."""
    rows = []
    for name, num_bytes, limit, run in cases:
        ms = median_ms(run)
        gb_s = num_bytes / ms / 1e6
        rows.append(Row(name, num_bytes, limit, ms, gb_s, gb_s / limits[limit]))
    return rows


def measure_limits() -> dict[Limit, float]:
    """Return the rates of plain copies, GB/s."""
    num_bytes = 1 << 30
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device="cuda")
    target, host = torch.empty_like(source), source.cpu().pin_memory()
    return {
        "device": 2 * num_bytes / median_ms(lambda: target.copy_(source)) / 1e6,
        "bus": num_bytes / median_ms(lambda: target.copy_(host, non_blocking=True)) / 1e6,
    }


def median_ms(run: Callable[[], object]) -> float:
    """Return the median time of a run, by events, the cache of the device flushed before each."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=300, return_mode="median"))


def describe(num_tokens: int) -> dict[str, Any]:
    """Return where and when, and of what."""
    commit = ["git", "rev-parse", "HEAD"]
    root = Path(__file__).parent.parent
    found = subprocess.run(commit, check=False, capture_output=True, text=True, cwd=root)
    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": found.stdout.strip() or None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.import_module("triton").__version__,
        "tokens": num_tokens,
    }


def show(facts: dict[str, Any], limits: dict[Limit, float], rows: list[Row]) -> None:
    """Print the table."""
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"plain copies: device {limits['device']:.0f} GB/s, bus {limits['bus']:.1f} GB/s")
    print(f"{'kernel':44} {'MiB':>9} {'ms':>9} {'GB/s':>8} {'of copy':>8}")
    for row in rows:
        mib = row.num_bytes / (1 << 20)
        print(f"{row.name:44} {mib:9.1f} {row.ms:9.4f} {row.gb_s:8.1f} {row.of_limit:8.0%}")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072, help="a multiple of 128")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu_kernels needs a CUDA device, and torch sees none: nothing measured.")
        return 0
    if importlib.util.find_spec("triton") is None:
        print("benchmarks.gpu_kernels needs triton, which is not installed: nothing measured.")
        return 0
    torch.manual_seed(0)
    facts, limits = describe(options.tokens), measure_limits()
    rows = measure(make_cases("cuda", options.tokens), limits)
    show(facts, limits, rows)
    if options.json is not None:
        found = {**facts, "copy_gb_s": limits, "rows": [row._asdict() for row in rows]}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
