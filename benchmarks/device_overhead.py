"""What OffloadedCache costs when everything fits on the device, against DynamicCache.

Decoding, one token at a time, with the same context in either cache: two layers in the shape of an
8B model in bfloat16, and a small model in float32. The contexts are injected, not computed. Both
are measured in turns and compared round by round, because machines drift.

    python -m benchmarks.device_overhead [--tokens 8192] [--rounds 40] [--profile] [--json FILE]
"""

import argparse
import cProfile
import json
import os
import pstats
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from offload import OffloadedCache

SHAPES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "8B, 2 layers": (
        torch.bfloat16,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "small, 4 layers": (
        torch.float32,
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
        },
    ),
}
BAR = 0.10


def make_model(shape: str) -> Any:
    """Build a random Llama."""
    dtype, sizes = SHAPES[shape]
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=1 << 20, **sizes)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def inject(cache: Cache, model: Any, num_tokens: int) -> None:
    """Fill a cache with random keys and values."""
    config = model.config
    shape = (1, config.num_key_value_heads, num_tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape).to(model.dtype), torch.randn(shape).to(model.dtype), layer)


def measure(shape: str, num_tokens: int, rounds: int, *, profile: bool) -> dict[str, Any]:
    """Decode with both caches in turns; return medians."""
    model, token = make_model(shape), torch.tensor([[1]])
    stock = DynamicCache(config=model.config)
    with OffloadedCache(["gpu"]) as ours, torch.no_grad():
        caches: dict[str, Cache] = {"DynamicCache": stock, "OffloadedCache": ours}
        times: dict[str, list[float]] = {name: [] for name in caches}
        for cache in caches.values():
            inject(cache, model, num_tokens)
            model(token, past_key_values=cache)
        for number in tqdm(range(rounds), desc=shape, file=sys.stderr):
            order = list(caches.items())
            for name, cache in order if number % 2 else reversed(order):
                start = time.perf_counter()
                model(token, past_key_values=cache)
                times[name].append(time.perf_counter() - start)
        if profile:
            print_profile(model, token, ours)
    pairs = zip(times["OffloadedCache"], times["DynamicCache"], strict=True)
    return {
        "shape": shape,
        "ms_per_token": {name: statistics.median(each) * 1e3 for name, each in times.items()},
        "best_ms_per_token": {name: min(each) * 1e3 for name, each in times.items()},
        "overhead": statistics.median(mine / other for mine, other in pairs) - 1,
    }


def print_profile(model: Any, token: torch.Tensor, cache: Cache) -> None:
    """Print where the time of some steps goes."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(20):
        model(token, past_key_values=cache)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def main() -> None:
    """Measure every shape and print a table; ``--json`` also writes one object to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = [
        measure(shape, args.tokens, args.rounds, profile=args.profile) for shape in args.shapes
    ]
    for result in results:
        times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in result["ms_per_token"].items())
        best = ", ".join(f"{ms:.2f}" for ms in result["best_ms_per_token"].values())
        overhead = f"{result['overhead']:+.1%}   (bar: <= {BAR:+.0%})"
        print(f"{result['shape']:16} {times} a token; best {best}; {overhead}")
    if args.json:
        about = {
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "torch": torch.__version__,
            "tokens": args.tokens,
            "rounds": args.rounds,
        }
        args.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
