"""What it costs to index keys, by step and as a share of prefill.

Steps are timed alone on the keys of ``offload.evals.parametric``; ``other`` is what is left of the
whole build of a layer of eight heads: residuals, means, checks, joins. The share of prefill is that
of all heads of all layers and of every token once; a cache leaves out its last tokens, and indexes
those twice that were generated. It is stated for two models: the recall model, whose keys are
indexed after it has read a document into a ``DynamicCache``, and the shape of an 8B model, by
arithmetic with the speed of its matrix products and of its attention measured here. All times are
CPU times of one thread, the shortest of some.

    python -m benchmarks.index_build [--json FILE] [--markdown FILE]
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from offload.evals.parametric import Shape, make_head
from offload.index.clusters import SEGMENT_TOKENS
from offload.index.kmeans import spherical_kmeans
from offload.index.residual import ResidualIndex, Settings
from offload.index.value_codes import code_values
from offload.kernels.codes import encode
from offload.kernels.sign_planes import NUM_SIGNS
from offload.prefill import prefill
from offload.recall_data import build_document
from offload.recall_model import load_recall_model

PIECE_TOKENS = 512
REPEATS = 5


@dataclass(frozen=True)
class Steps:
    """Microseconds per key and head."""

    head_dim: int
    num_bits: int
    build: float
    kmeans: float
    key_codes: float
    value_codes: float

    @property
    def other(self) -> float:
        """What is left."""
        return self.build - self.kmeans - self.key_codes - self.value_codes


@dataclass(frozen=True)
class Share:
    """Index against prefill of one context."""

    model: str
    num_tokens: int
    num_bits: int
    index_s: float
    prefill_s: float

    @property
    def share(self) -> float:
        """Of prefill."""
        return self.index_s / self.prefill_s


@dataclass(frozen=True)
class Decoder:
    """The shape of a model, which its FLOPs follow from."""

    num_layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def num_indexes(self) -> int:
        """KV heads of all layers."""
        return self.num_layers * self.num_kv_heads

    def matmul_flops(self, num_tokens: int) -> float:
        """Of the projections."""
        attention = 2 * 2 * self.hidden * (self.num_heads + self.num_kv_heads) * self.head_dim
        return float(
            num_tokens * self.num_layers * (attention + 2 * 3 * self.hidden * self.intermediate)
        )

    def attention_flops(self, num_tokens: int) -> float:
        """Of causal attention."""
        width = self.num_layers * self.num_heads * self.head_dim
        return 4.0 * width * num_tokens * num_tokens / 2

    def index_flops(self, num_tokens: int) -> float:
        """Of the matrix products of the index: three rounds on every fourth key, then all keys."""
        clusters = SEGMENT_TOKENS // Settings().tokens_per_cluster
        nearest = 2 * clusters * self.head_dim * (1 + 3 / 4)
        codes = 2 * self.head_dim * (2 * self.head_dim + 2 * NUM_SIGNS)
        return num_tokens * self.num_indexes * (nearest + codes)


def cpu_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the CPU time of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def measure_steps(head_dim: int, num_bits: int) -> Steps:
    """Time the build of one segment of a layer of the parametric text."""
    head, num_heads = make_head(Shape(SEGMENT_TOKENS)), Decoder().num_kv_heads
    keys, values = (
        rows[:SEGMENT_TOKENS, :head_dim].bfloat16().repeat(num_heads, 1, 1)
        for rows in (head.keys, head.values)
    )
    clusters = SEGMENT_TOKENS // Settings().tokens_per_cluster
    whole = cpu_seconds(lambda: ResidualIndex.build(keys, values, num_bits=num_bits))
    one, residuals = keys[:1].float(), values[:1].float()
    alone = [
        cpu_seconds(lambda: spherical_kmeans(one, clusters)),
        cpu_seconds(lambda: encode(one, num_bits, unbiased=True)),
        cpu_seconds(lambda: code_values(residuals).decode()),
    ]
    parts = [seconds / SEGMENT_TOKENS * 1e6 for seconds in alone]
    return Steps(head_dim, num_bits, whole / num_heads / SEGMENT_TOKENS * 1e6, *parts)


def measure_recall_model(num_tokens: int, num_bits: Sequence[int]) -> Iterator[Share]:
    """Read a document, then index what the model keeps of it."""
    model, _ = load_recall_model()
    document = build_document(num_tokens, 1, seed=0)
    tokens, caches = torch.tensor([document.token_ids]), []

    def read() -> None:
        caches.append(DynamicCache())
        prefill(model, caches[-1], tokens, PIECE_TOKENS, lambda _: None)

    prefill_s = cpu_seconds(read, repeats=2)
    kept: list[Any] = caches[-1].layers  # mypy does not know which kind of layer
    layers = [(layer.keys[0], layer.values[0]) for layer in kept]
    for bits in num_bits:

        def index(bits: int = bits) -> None:
            for keys, values in layers:
                ResidualIndex.build(keys, values, num_bits=bits)

        yield Share("recall model", num_tokens, bits, cpu_seconds(index), prefill_s)


def matmul_speed(dtype: torch.dtype, num_rows: int = 512) -> float:
    """Return FLOP/s of the products of the 8B shape's feed-forward."""
    shape = Decoder()
    rows = torch.randn(num_rows, shape.hidden).to(dtype)
    weights = torch.randn(shape.intermediate, shape.hidden).to(dtype)
    seconds = cpu_seconds(lambda: rows @ weights.T, repeats=3)
    return 2 * num_rows * shape.hidden * shape.intermediate / seconds


def attention_speed(dtype: torch.dtype, num_queries: int = 512, num_keys: int = 16384) -> float:
    """Return FLOP/s of attention of a few heads."""
    shape = Decoder()
    query = torch.randn(1, 2, num_queries, shape.head_dim).to(dtype)
    keys, values = (torch.randn(1, 2, num_keys, shape.head_dim).to(dtype) for _ in range(2))
    seconds = cpu_seconds(lambda: scaled_dot_product_attention(query, keys, values), repeats=3)
    return 2 * 4 * num_queries * num_keys * shape.head_dim / seconds


@dataclass(frozen=True)
class Speeds:
    """FLOP/s of one thread, each in the faster of float32 and bfloat16."""

    matmul: float
    attention: float


def measure_speeds() -> Speeds:
    """Measure both."""
    dtypes = (torch.float32, torch.bfloat16)
    return Speeds(max(map(matmul_speed, dtypes)), max(map(attention_speed, dtypes)))


def eight_billion(steps: Sequence[Steps], speeds: Speeds) -> Iterator[Share]:
    """Yield the shares of the 8B shape, from what its parts take on this machine."""
    shape = Decoder()
    for num_tokens in (32768, 131072):
        prefill_s = shape.matmul_flops(num_tokens) / speeds.matmul
        prefill_s += shape.attention_flops(num_tokens) / speeds.attention
        for step in steps:
            if step.head_dim == shape.head_dim:
                index_s = step.build * 1e-6 * shape.num_indexes * num_tokens
                yield Share("8B shape", num_tokens, step.num_bits, index_s, prefill_s)


def report(steps: Sequence[Steps], speeds: Speeds, shares: Sequence[Share]) -> str:
    """Return the tables."""
    shape = Decoder()
    flops = "; ".join(
        f"{num_tokens // 1024}K tokens: index {index / 1e12:.1f}, prefill {whole / 1e12:.0f} "
        f"TFLOP, {index / whole:.2%}"
        for num_tokens in (32768, 131072)
        for index in [shape.index_flops(num_tokens)]
        for whole in [shape.matmul_flops(num_tokens) + shape.attention_flops(num_tokens)]
    )
    return "\n".join(
        [
            "Microseconds per key and head:\n",
            "| head_dim | bits | build | k-means | key codes | value codes | other |",
            "|---|---|---|---|---|---|---|",
            *[
                f"| {s.head_dim} | {s.num_bits} | {s.build:.2f} | {s.kmeans:.2f} | "
                f"{s.key_codes:.2f} | {s.value_codes:.2f} | {s.other:.2f} |"
                for s in steps
            ],
            "\nThe bar is 5 % of prefill:\n",
            "| model | tokens | bits | index, s | prefill, s | share |",
            "|---|---|---|---|---|---|",
            *[
                f"| {s.model} | {s.num_tokens} | {s.num_bits} | {s.index_s:.2f} | "
                f"{s.prefill_s:.1f} | {s.share:.2%} |"
                for s in shares
            ],
            f"\nThe 8B shape is reckoned with {speeds.matmul / 1e9:.0f} GFLOP/s of matrix products "
            f"and {speeds.attention / 1e9:.0f} of attention. By FLOPs alone, {flops}.",
        ]
    )


def machine() -> str:
    """Say what this runs on."""
    return f"torch {torch.__version__}, one thread of {platform.machine()}"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures")
    parser.add_argument("--markdown", type=Path, help="write the report")
    options = parser.parse_args(sys.argv[1:])
    torch.set_num_threads(1)
    steps = [measure_steps(head_dim, bits) for head_dim in (64, 128) for bits in (1, 2)]
    speeds = measure_speeds()
    shares = [share for n in (8192, 16384) for share in measure_recall_model(n, (1, 2))]
    shares += eight_billion(steps, speeds)
    text = report(steps, speeds, shares)
    print(text)
    if options.json is not None:
        content = {
            "machine": machine(),
            "steps": [asdict(step) for step in steps],
            "flops_per_s": asdict(speeds),
            "shares": [{**asdict(share), "share": share.share} for share in shares],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.markdown is not None:
        parts = [(__doc__ or "").strip(), f"Measured with {machine()}.", text]
        options.markdown.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
