"""Exact decoding from disk against the raw disk, and storing during prefill against DynamicCache.

Everything is measured in one run, alternating, and reported as medians, because disks and machines
drift. The model has Llama-3.1-8B's attention (32 heads, 8 KV heads of 128) and a narrow body, so
that attention over the cache is what takes the time; its weights are random. The context is
injected into the tiers, not computed.

    python benchmarks/exact_disk.py [--tokens 32768] [--json FILE]
"""

import argparse
import json
import mmap
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from offload import OffloadedCache

DTYPE = torch.bfloat16
NUM_KV_HEADS, HEAD_DIM = 8, 128
CAPACITY = {"disk": "16GiB"}
NUM_THREADS, OP_BYTES = 8, 1 << 20
"""As the disk tier reads: its threads, and a staging buffer of 8 MiB split among them."""
STEPS = 4
"""Tokens decoded per round."""


def make_model(num_layers: int, **shape: Any) -> Any:
    """Build a random Llama."""
    config = LlamaConfig(
        vocab_size=1024,
        num_hidden_layers=num_layers,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=1 << 20,
        **shape,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def inject(cache: OffloadedCache, num_layers: int, num_tokens: int) -> None:
    """Fill a cache with random keys and values, in pieces."""
    step = 4096
    states = torch.randn(1, NUM_KV_HEADS, step, HEAD_DIM).to(DTYPE)
    for layer in range(num_layers):
        for start in range(0, num_tokens, step):
            part = states[:, :, : min(step, num_tokens - start)]
            cache.update(part, part, layer)


def raw_bandwidth(directory: Path) -> float:
    """Read every segment file once with plain ``preadv`` and O_DIRECT; return bytes per second.

    The same files, operation size and number of threads as the disk tier uses.
    """
    files = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in directory.glob("*.kvseg")]
    jobs = [
        (fd, offset)
        for fd in files
        for offset in range(0, os.fstat(fd).st_size // OP_BYTES * OP_BYTES, OP_BYTES)
    ]
    local = threading.local()

    def read(job: tuple[int, int]) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, OP_BYTES)
        return os.preadv(job[0], [local.buffer], job[1])

    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        total = sum(pool.map(read, jobs))
    elapsed = time.perf_counter() - started
    for fd in files:
        os.close(fd)
    return total / elapsed


def measure_decode(num_tokens: int, num_layers: int, rounds: int) -> dict[str, Any]:
    """Decode with every chunk on disk, alternating with raw reads of the same files."""
    shape = {"hidden_size": 512, "intermediate_size": 1024}
    model = make_model(num_layers, num_attention_heads=32, head_dim=HEAD_DIM, **shape).to(DTYPE)
    ours, raw, waits = [], [], []
    with OffloadedCache(["disk"], capacity=CAPACITY) as cache, torch.no_grad():
        inject(cache, num_layers, num_tokens)
        cache.flush()
        folder = cache.disk_folder
        assert folder is not None
        step = torch.tensor([[1]])
        model(step, past_key_values=cache)
        for _ in tqdm(range(rounds), desc="decode and raw reads", file=sys.stderr):
            before, started = cache.stats(), time.perf_counter()
            for _ in range(STEPS):
                model(step, past_key_values=cache)
            elapsed, after = time.perf_counter() - started, cache.stats()
            loaded = after.tiers["disk"].loaded_bytes - before.tiers["disk"].loaded_bytes
            ours.append(loaded / elapsed)
            waits.append((after.load_wait_s - before.load_wait_s) / elapsed)
            raw.append(raw_bandwidth(folder))
        stats = cache.stats()
    ratios = [a / b for a, b in zip(ours, raw, strict=True)]
    return {
        "kv_bytes": stats.tiers["disk"].used_bytes,
        "decode_bytes_per_s": statistics.median(ours),
        "raw_bytes_per_s": statistics.median(raw),
        "ratio": statistics.median(ours) / statistics.median(raw),
        "ratio_by_round": [round(ratio, 3) for ratio in ratios],
        "share_waited": statistics.median(waits),
        "prefetch_hit_rate": stats.prefetch_hit_rate,
    }


def measure_prefill(num_tokens: int, rounds: int) -> dict[str, Any]:
    """Prefill in pieces of 1024 with DynamicCache and with chunks stored on disk.

    Per byte of KV this float32 model computes about 25 times less than Llama-3.1-8B, so storing is
    the larger part here.
    """
    shape = {"hidden_size": 1024, "intermediate_size": 2048}
    model = make_model(4, num_attention_heads=16, head_dim=64, **shape)
    ids = torch.randint(0, 1024, (1, num_tokens))

    def prefill(cache: Cache) -> float:
        started = time.perf_counter()
        for start in range(0, num_tokens, 1024):
            model(ids[:, start : start + 1024], past_key_values=cache, logits_to_keep=1)
        if isinstance(cache, OffloadedCache):
            cache.flush()
        return time.perf_counter() - started

    times: dict[str, list[float]] = {"DynamicCache": [], "disk": [], "gpu+cpu+disk": []}
    with torch.no_grad():
        for _ in tqdm(range(rounds), desc="prefill", file=sys.stderr):
            times["DynamicCache"].append(prefill(DynamicCache(config=model.config)))
            for tiers in (["disk"], ["gpu", "cpu", "disk"]):
                small = {"gpu": "32MiB", "cpu": "32MiB", "disk": "16GiB"}
                capacity = {tier: small[tier] for tier in tiers}
                with OffloadedCache(tiers, capacity=capacity) as cache:
                    times["+".join(tiers)].append(prefill(cache))
    stock = times["DynamicCache"]
    return {
        "seconds": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "overhead": {
            name: statistics.median(a / b for a, b in zip(values, stock, strict=True)) - 1
            for name, values in times.items()
            if name != "DynamicCache"
        },
    }


def main() -> None:
    """Run both measurements and print a table; ``--json`` also writes one object to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--prefill-tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = {
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "tokens": args.tokens,
        "decode": measure_decode(args.tokens, args.layers, args.rounds),
        "prefill": measure_prefill(args.prefill_tokens, max(3, args.rounds // 2)),
    }
    decode, prefill = result["decode"], result["prefill"]
    print(f"decode from disk   {decode['decode_bytes_per_s'] / 1e9:.2f} GB/s")
    print(f"raw preadv         {decode['raw_bytes_per_s'] / 1e9:.2f} GB/s")
    print(f"ratio              {decode['ratio']:.0%}   (bar: >= 80 %)")
    for name, overhead in prefill["overhead"].items():
        print(f"prefill, {name:12} {overhead:+.1%} over DynamicCache   (bar: <= +15 %)")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
