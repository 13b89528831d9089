"""A host that holds codes against one that holds raw chunks and needs the disk for the rest.

Speed: one layer of Llama-3.1-8B's attention (32 heads, 8 KV heads of 128) in bfloat16 decodes with
so little host memory that raw chunks overflow to the disk, and with codes of a fixed rate in the
same memory, which hold more of them or all; all contenders take turns in each round. Answers: the
recall model in float32 reads documents whose chunks, but for tails and a few on the device, are all
held by the host.

    python -m benchmarks.coded_memory [--tokens N] [--shares S ...] [--rounds N] [--threads N]
        [--recall-tokens N] [--documents N] [--questions N] [--json FILE]
"""

import argparse
import json
import shlex
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from offload.bench.provenance import read_provenance
from offload.cache import OffloadedCache
from offload.core import CacheCore
from offload.exact import AttentionCall
from offload.recall_data import build_document
from offload.recall_model import load_recall_model
from offload.settings import check_settings
from offload.tiers.codec_fixed import FIXED, slot_bytes_of
from offload.types import ChunkLayout
from tools.recall_eval import answers, far_facts

_HEADS, _KV_HEADS, _DIM, _CHUNK = 32, 8, 128, 64
_LAYOUT = ChunkLayout(_KV_HEADS, _CHUNK, _DIM, _DIM, torch.bfloat16)
_DEVICE_BYTES = 8 << 20
_STEPS = 3
_GIB = 1 << 30


def open_core(codec: str, disk: str, cpu_bytes: int) -> CacheCore:
    """Return an empty cache of three tiers, hardly any of it on the device."""
    capacity: dict[str, int | str] = {"gpu": _DEVICE_BYTES, "cpu": cpu_bytes, "disk": "8GiB"}
    codecs = {"cpu": codec, "disk": disk}
    return CacheCore(
        check_settings(("gpu", "cpu", "disk"), "exact", capacity, None, _CHUNK, codecs)
    )


def decode(core: CacheCore, query: Tensor, row: Tensor) -> float:
    """Return the seconds of a step of one layer."""
    started = perf_counter()
    core.attend(0, AttentionCall(query, _DIM**-0.5), core.append(0, row, row))
    return perf_counter() - started


def measure_steps(num_tokens: int, share: float, rounds: int) -> list[dict[str, Any]]:
    """Time decoding by all contenders in turns; ``share`` of the raw bytes fits into the host."""
    raw_bytes = num_tokens * _LAYOUT.chunk_bytes // _CHUNK
    small, large = int(share * raw_bytes), 2 * raw_bytes
    contenders: dict[str, tuple[str, str, int]] = {
        "raw, all in memory": ("raw", "raw", large),
        "raw, the rest on disk": ("raw", "raw", small),
        "raw, the rest on disk in int8": ("raw", "int8", small),
        **{f"{name} on both": (name, name, small) for name in FIXED},
    }
    states = torch.randn(1, _KV_HEADS, 4096, _DIM).bfloat16()
    query, row = torch.randn(1, _HEADS, 1, _DIM).bfloat16(), states[:, :, :1]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        cores = {}
        for name, arguments in tqdm(contenders.items(), desc="filling", file=sys.stderr):
            cores[name] = core = open_core(*arguments)
            stack.callback(core.close)
            for start in range(0, num_tokens, 4096):
                part = states[:, :, : min(4096, num_tokens - start)]
                core.append(0, part, part)
            core.flush()
            decode(core, query, row)
        for _ in tqdm(range(rounds), desc="steps", file=sys.stderr):
            for name, core in cores.items():
                decode(core, query, row)  # what was read ahead of others' steps is used up
                steps = [decode(core, query, row) for _ in range(_STEPS)]
                times[name].append(statistics.median(steps))
        return [{"share": share, **_report(name, core, times)} for name, core in cores.items()]


def _report(name: str, core: CacheCore, times: dict[str, list[float]]) -> dict[str, Any]:
    base = times["raw, the rest on disk"]  # of the same rounds, because machines drift
    tiers = core.stats().tiers
    return {
        "contender": name,
        "host_codec": tiers["cpu"].codec,
        "host_bytes": tiers["cpu"].capacity_bytes,
        "host_tokens": tiers["cpu"].num_tokens,
        "disk_tokens": tiers["disk"].num_tokens,
        "step_ms": 1e3 * statistics.median(times[name]),
        "speedup": statistics.median(a / b for a, b in zip(base, times[name], strict=True)),
    }


@torch.no_grad()
def measure_answers(num_tokens: int, documents: int, questions: int) -> list[dict[str, Any]]:
    """Ask the recall model about documents that the host holds in each codec."""
    model, _ = load_recall_model()
    capacity = {"gpu": "2MiB", "cpu": "64MiB"}
    found = []
    for codec in tqdm(("raw", *FIXED) if documents else (), desc="answers", file=sys.stderr):
        right = asked = 0
        for seed in range(100, 100 + documents):
            document = build_document(num_tokens, num_tokens // 100, seed)
            with OffloadedCache(["gpu", "cpu"], codec={"cpu": codec}, capacity=capacity) as cache:
                for piece in torch.tensor([document.token_ids]).split(1024, 1):
                    model(piece, past_key_values=cache, logits_to_keep=1)
                for fact in far_facts(document, questions, seed):
                    right += answers(model, cache, document, fact)
                    asked += 1
                host = cache.stats().tiers["cpu"]
        found.append({"codec": codec, "right": right, "asked": asked, "held": host.num_tokens})
    return found


def densities() -> list[dict[str, Any]]:
    """Return what a token of one 8B-shaped layer takes, and what a GiB holds of 32 such layers."""
    sizes = {"raw": _LAYOUT.slot_bytes}
    sizes |= {name: slot_bytes_of(codec, _LAYOUT) for name, codec in FIXED.items()}
    return [
        {
            "codec": name,
            "bytes_per_token_and_layer": size / _CHUNK,
            "ratio": _LAYOUT.slot_bytes / size,
            "tokens_per_gib": int(_GIB / (32 * size / _CHUNK)),
        }
        for name, size in sizes.items()
    ]


def main() -> None:
    """Measure and print; ``--json`` also writes one object to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[0.65, 0.4], help="of raw bytes, in host memory"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recall-tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=2, help="0: answers are left out")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.coded_memory", *sys.argv[1:]]),
        "provenance": asdict(read_provenance()),
        "densities": densities(),
        "answers": measure_answers(args.recall_tokens, args.documents, args.questions),
        "steps": [
            step for share in args.shares for step in measure_steps(args.tokens, share, args.rounds)
        ],
    }
    for part in ("densities", "answers", "steps"):
        for each in result[part]:
            print(part, each)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
