"""Recall of nearest-key indexes when queries are unlike keys, against the keys they look at.

Heads of ``benchmarks.parametric``: queries lie in another cone than keys. For every index and every
setting of its knob, the share of the 100 keys with the largest logits that a search for 100 tokens
returns, and what it read: bytes of keys, centroids, lists and edges, as a share of the bytes of all
keys. Build times are CPU seconds of one thread.

    python -m benchmarks.ann_recall [--full] [--json FILE] [--markdown FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.parametric import FLAT, MEDIUM, SHARP, Head, Shape, make_head
from offload.index.ann import AnnIndex
from offload.index.base import KeyIndex
from offload.index.faiss_bridge import faiss_module
from offload.index.graph_build import nearest_keys
from offload.index.projection import ProjectionIndex

_K = 100
_SCANS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
_BEAMS = (100, 150, 200, 300, 400, 600, 800, 1200, 1600)
_ENOUGH = 0.97
"""Recall beyond which a method is not asked to read more."""


@dataclass(frozen=True)
class Point:
    """One method at one setting of its knob."""

    num_keys: int
    temperature: float
    method: str
    knob: float
    recall: float
    scanned_share: float
    build_us_per_key: float


@dataclass(frozen=True)
class Built:
    """An index, how its knob is turned, and the queries as it takes them."""

    index: KeyIndex
    knob: str
    queries: Tensor
    build_s: float

    def at(self, value: float) -> KeyIndex:
        """Return the same index with its knob turned."""
        index: Any = self.index
        settings = replace(index.settings, **{self.knob: value})
        turned: KeyIndex = replace(index, settings=settings)
        return turned


def methods(head: Head) -> dict[str, Callable[[], Built]]:
    """Return how to build each index over a head."""
    keys, values, train = (t.unsqueeze(0) for t in (head.keys, head.values, head.train_queries))
    towards, back = _whitening(head.train_queries)

    def timed(build: Callable[[], KeyIndex], knob: str, queries: Tensor = head.queries) -> Built:
        started = time.process_time()
        index = build()
        return Built(index, knob, queries, time.process_time() - started)

    def graph(**options: Any) -> Callable[[], Built]:
        return lambda: timed(lambda: ProjectionIndex.build(keys, values, **options), "beam")

    def faiss(kind: str, knob: str) -> Callable[[], Built]:
        return lambda: timed(lambda: AnnIndex.build(keys, values, kind=kind), knob)

    return {
        "IVF": faiss("ivf", "scan"),
        "IVF, whitened": lambda: timed(
            lambda: AnnIndex.build(keys @ towards, values), "scan", head.queries @ back
        ),
        "HNSW": faiss("hnsw", "beam"),
        "projection": graph(queries=train),
        "projection, nearest key as the only pivot": graph(queries=train, pivots=1),
        "projection, an eighth of the queries": graph(queries=train[:, ::8]),
        "projection, no queries": graph(),
    }


def _whitening(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps for keys and queries that keep inner products and whiten the queries."""
    covariance = queries.mT @ queries / len(queries)
    variances, directions = torch.linalg.eigh(covariance)
    root = variances.clamp_min(1e-6 * float(variances.max())).sqrt()
    return directions * root, directions / root


def measure(head: Head, shape: Shape, only: Sequence[str]) -> Iterator[Point]:
    """Yield all points of a head."""
    truth = nearest_keys(head.queries, head.keys, _K)
    for name, build in methods(head).items():
        if only and name not in only:
            continue
        built = build()
        for value in _SCANS if built.knob == "scan" else _BEAMS:
            found, scanned = _search(built.at(value), built.queries)
            hit = (found.unsqueeze(2) == truth.unsqueeze(1)).any(1)
            point = Point(
                shape.num_keys,
                shape.temperature,
                name,
                value,
                float(hit.float().mean()),
                scanned / (len(truth) * shape.num_keys * shape.head_dim * 4),
                1e6 * built.build_s / shape.num_keys,
            )
            yield point
            if point.recall > _ENOUGH:
                break


def _search(index: KeyIndex, queries: Tensor) -> tuple[Tensor, int]:
    """Return what single queries found, ``[num_queries, _K]``, and the bytes they all scanned."""
    before = _hnsw_bytes(queries.shape[1])
    hits = [index.search(query.view(1, 1, -1), _K) for query in queries]
    counted = _hnsw_bytes(queries.shape[1]) - before
    ids = torch.full((len(queries), _K), -1)
    for row, hit in zip(ids, hits, strict=True):
        row[: hit.ids.shape[1]] = hit.ids[0]
    return ids, counted or sum(hit.scanned_bytes for hit in hits)


def _hnsw_bytes(dim: int) -> int:
    """Return what HNSW searches of this process have read; nobody else searches meanwhile."""
    stats = faiss_module().cvar.hnsw_stats
    return int(stats.ndis * dim * 4 + stats.nhops * 64 * 4)


def shapes(full: bool) -> list[Shape]:
    """Return the heads to measure."""
    small = Shape(num_train_queries=16000, num_queries=128)
    if not full:
        return [replace(small, num_train_queries=4096, num_queries=32)]
    large = Shape(num_keys=131072, num_train_queries=65536, num_queries=64)
    return [replace(small, temperature=t) for t in (FLAT, MEDIUM, SHARP)] + [large]


def summary(points: Sequence[Point]) -> list[str]:
    """Return a table: what each method reads for a recall, and its recall for what it reads."""
    lines = [
        "| keys | temperature | method | read for .90 | for .95 | recall at 3 % | at 5 % | at 8 % "
        "| build µs/key |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    runs = dict.fromkeys((p.num_keys, p.temperature, p.method) for p in points)
    for run in runs:
        own = [p for p in points if (p.num_keys, p.temperature, p.method) == run]
        recalls = np.array([p.recall for p in own])
        shares = np.array([p.scanned_share for p in own])
        needed = [_between(recalls, shares, wanted, "{:.1%}") for wanted in (0.9, 0.95)]
        reached = [_between(shares, recalls, share, "{:.3f}") for share in (0.03, 0.05, 0.08)]
        cells = [str(run[0]), f"{run[1]:g}", run[2], *needed, *reached]
        lines.append("| " + " | ".join([*cells, f"{own[0].build_us_per_key:.0f}"]) + " |")
    return lines


def _between(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], at: float, text: str) -> str:
    """Interpolate; a dash outside of what was measured."""
    order = np.argsort(x)
    if not x[order[0]] <= at <= x[order[-1]]:
        return "–"
    return text.format(float(np.interp(at, x[order], y[order])))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="16K and 128K keys; an hour")
    parser.add_argument("--only", nargs="+", default=[], help="these methods")
    parser.add_argument("--json", type=Path, help="write one line per point")
    parser.add_argument("--markdown", type=Path, help="write the table")
    options = parser.parse_args(sys.argv[1:])
    torch.set_num_threads(1)
    points = []
    for shape in shapes(options.full):
        head = make_head(shape)
        for point in tqdm(measure(head, shape, options.only), desc=f"{shape.num_keys} keys"):
            points.append(point)
            if options.json is not None:
                lines = [json.dumps(asdict(p)) for p in points]
                options.json.write_text("\n".join(lines) + "\n")
    print("\n".join(summary(points)))
    if options.markdown is not None:
        options.markdown.write_text("\n".join(summary(points)) + "\n")


if __name__ == "__main__":
    main()
