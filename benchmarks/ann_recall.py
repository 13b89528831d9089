"""Recall of nearest-key indexes when queries are unlike keys, against the keys they look at.

Heads of ``offload.evals.parametric``: queries lie in another cone than keys. For every index and
every setting of its knob, the share of the 100 keys with the largest logits that a search for 100
tokens returns, and what it read: bytes of keys, centroids, lists and edges, as a share of the bytes
of all keys. The exact scan has no knob: it reads every key. Times are CPU time of one thread, for
building the index of one head, and for a search with one query.

    python -m benchmarks.ann_recall [--full] [--json FILE] [--markdown FILE]
"""

import argparse
import json
import platform
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

from offload.evals.parametric import FLAT, SHARP, Head, Shape, make_head
from offload.index.ann import AnnIndex
from offload.index.base import KeyIndex
from offload.index.faiss_bridge import faiss_module
from offload.index.graph_build import nearest_keys
from offload.index.projection import ProjectionIndex
from offload.index.topk import TopKIndex

_K = 100
_SCANS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
_BEAMS = (100, 150, 200, 300, 400, 600, 800, 1200, 1600)
_STAR = "projection, nearest key as the only pivot"
_FEWER = "projection, an eighth of the queries"
_NONE = "projection, no queries"
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
    search_ms: float


@dataclass(frozen=True)
class Built:
    """An index, how its knob is turned, and the queries as it takes them."""

    index: KeyIndex
    knob: str | None
    queries: Tensor
    build_s: float

    def at(self, value: float) -> KeyIndex:
        """Return the same index with its knob turned."""
        if self.knob is None:
            return self.index
        index: Any = self.index
        settings = replace(index.settings, **{self.knob: value})
        turned: KeyIndex = replace(index, settings=settings)
        return turned


def methods(head: Head) -> dict[str, Callable[[], Built]]:
    """Return how to build each index over a head."""
    keys, values, train = (t.unsqueeze(0) for t in (head.keys, head.values, head.train_queries))
    towards, back = _whitening(head.train_queries)

    def timed(
        build: Callable[[], KeyIndex], knob: str | None, queries: Tensor = head.queries
    ) -> Built:
        started = time.process_time()
        index = build()
        return Built(index, knob, queries, time.process_time() - started)

    def graph(**options: Any) -> Callable[[], Built]:
        fixed = {"keys_per_place": keys.shape[1], **options}
        return lambda: timed(lambda: ProjectionIndex.build(keys, values, **fixed), "beam")

    def faiss(kind: str, knob: str) -> Callable[[], Built]:
        return lambda: timed(lambda: AnnIndex.build(keys, values, kind=kind), knob)

    return {
        "IVF": faiss("ivf", "scan"),
        "IVF, whitened": lambda: timed(
            lambda: AnnIndex.build(keys @ towards, values), "scan", head.queries @ back
        ),
        "HNSW": faiss("hnsw", "beam"),
        "projection": graph(queries=train),
        _STAR: graph(queries=train, pivots=1),
        _FEWER: graph(queries=train[:, ::8]),
        _NONE: graph(),
        "exact": lambda: timed(lambda: TopKIndex.build(keys, values, renormalised=True), None),
    }


def _whitening(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps for keys and queries that keep inner products and whiten the queries."""
    covariance = queries.mT @ queries / len(queries)
    variances, directions = torch.linalg.eigh(covariance)
    root = variances.clamp_min(1e-6 * float(variances.max())).sqrt()
    return directions * root, directions / root


def measure(head: Head, shape: Shape, names: Sequence[str]) -> Iterator[Point]:
    """Yield all points of a head."""
    truth = nearest_keys(head.queries, head.keys, _K)
    build = methods(head)
    for name in names:
        built = build[name]()
        for value in _knobs(built.knob):
            started = time.process_time()
            found, scanned = _search(built.at(value), built.queries)
            search_s = time.process_time() - started
            hit = (found.unsqueeze(2) == truth.unsqueeze(1)).any(1)
            point = Point(
                shape.num_keys,
                shape.temperature,
                name,
                value,
                float(hit.float().mean()),
                scanned / (len(truth) * shape.num_keys * shape.head_dim * 4),
                1e6 * built.build_s / shape.num_keys,
                1e3 * search_s / len(truth),
            )
            yield point
            if point.recall > _ENOUGH:
                break


def _knobs(knob: str | None) -> Sequence[float]:
    if knob is None:
        return (0.0,)
    return _SCANS if knob == "scan" else _BEAMS


def _search(index: KeyIndex, queries: Tensor) -> tuple[Tensor, int]:
    """Return what single queries found, ``[num_queries, _K]``, and the bytes they all scanned."""
    before = _hnsw_bytes(queries.shape[1])
    hits = [index.search(query.view(1, 1, -1), _K) for query in queries]
    counted = _hnsw_bytes(queries.shape[1]) - before
    ids = torch.full((len(queries), _K), -1)
    for row, hit in zip(ids, hits, strict=True):
        row[: hit.ids.shape[1]] = hit.ids[0]
    return ids, counted or sum(int(hit.scanned_bytes) for hit in hits)


def _hnsw_bytes(dim: int) -> int:
    """Return what HNSW searches of this process have read; nobody else searches meanwhile."""
    stats = faiss_module().cvar.hnsw_stats
    return int(stats.ndis * dim * 4 + stats.nhops * 64 * 4)


def runs(full: bool) -> list[tuple[Shape, Sequence[str]]]:
    """Return the heads to measure, and with which methods."""
    published = ["exact", "IVF", "IVF, whitened", "HNSW", "projection"]
    small = Shape(num_train_queries=16000, num_queries=64)
    if not full:
        return [(replace(small, num_train_queries=4096, num_queries=32), published)]
    large = Shape(num_keys=131072, num_train_queries=16384, num_queries=32)
    return [
        (replace(small, temperature=FLAT), published),
        (small, [*published, _STAR, _FEWER, _NONE]),
        (replace(small, temperature=SHARP), published),
        (large, published),
        (replace(large, temperature=FLAT), ["projection"]),
        (replace(large, temperature=SHARP), ["projection"]),
    ]


def summary(points: Sequence[Point]) -> list[str]:
    """Return a table: what each method reads for a recall, and its recall for what it reads."""
    lines = [
        "| keys | temperature | method | read for .90 | for .95 | recall at 3 % | at 5 % | at 8 % "
        "| build µs/key | search ms at .90 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    measured = dict.fromkeys((p.num_keys, p.temperature, p.method) for p in points)
    for run in measured:
        own = [p for p in points if (p.num_keys, p.temperature, p.method) == run]
        recalls = np.array([p.recall for p in own])
        shares = np.array([p.scanned_share for p in own])
        needed = [_between(recalls, shares, wanted, "{:.1%}") for wanted in (0.9, 0.95)]
        reached = [_between(shares, recalls, share, "{:.3f}") for share in (0.03, 0.05, 0.08)]
        cells = [str(run[0]), f"{run[1]:g}", run[2], *needed, *reached]
        cells.append(f"{own[0].build_us_per_key:.0f}")
        cells.append(_between(recalls, np.array([p.search_ms for p in own]), 0.9, "{:.2f}"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _between(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], at: float, text: str) -> str:
    """Interpolate; beyond what was measured, the nearest point is a bound: both grow together."""
    order = np.argsort(x)
    bound = "≤ " if at < x.min() else "≥ " if at > x.max() else ""
    return bound + text.format(float(np.interp(at, x[order], y[order])))


def machine() -> str:
    """Say what this runs on."""
    faiss = faiss_module().__version__
    return f"torch {torch.__version__}, faiss {faiss}, one thread of {platform.machine()}"


def write_markdown(file: Path, points: Sequence[Point]) -> None:
    """Write the table, with what it is and what it was measured on."""
    parts = [f"{__doc__}".strip(), f"Measured with {machine()}.", "\n".join(summary(points))]
    file.write_text("\n\n".join(parts) + "\n")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="16K and 128K keys; a quarter hour")
    parser.add_argument("--json", type=Path, help="write all points, as they are measured")
    parser.add_argument("--markdown", type=Path, help="write the table")
    options = parser.parse_args(sys.argv[1:])
    torch.set_num_threads(1)
    points: list[Point] = []
    for shape, names in runs(options.full):
        head = make_head(shape)
        title = f"{shape.num_keys} keys, {shape.temperature:g}"
        for point in tqdm(measure(head, shape, names), desc=title):
            points.append(point)
            if options.json is not None:
                content = {"machine": machine(), "points": [asdict(p) for p in points]}
                options.json.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(summary(points)))
    if options.markdown is not None:
        write_markdown(options.markdown, points)


if __name__ == "__main__":
    main()
