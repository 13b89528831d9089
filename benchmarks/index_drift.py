"""Recall while the text moves on: 32K tokens generated after a prompt, whose topic shifts.

The text is that of ``shifting_text``, which does not shift, gradually, or in four steps. Indexes
grow as a cache grows them, by segments of 1,024 tokens that are replaced by one of 8,192; ``fresh``
is built at once over the same tokens. Beside them is what systems do that learn from the prompt
alone: new keys go to its clusters, or are coded with its codebooks (2 of 64 entries as PQCache, and
16 of 256); ``relearned`` has codebooks of all keys.

32 queries are asked after the last token, one by one, each for the content of an earlier token: one
half for any, the other half for one of the last 4,096. Recall is of the 100 keys with the largest
logits among those indexed. What is read is 1 % of the context, or 300 tokens however long it is:
with a share, recall rises as the context grows, with a number it falls, shift or no shift.

    python -m benchmarks.index_drift [--full] [--json FILE] [--markdown FILE]
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from benchmarks.shifting_text import GENERATED, PROMPT, SHIFTS, Text
from offload.index.base import Hits, KeyIndex, combine_group
from offload.index.bounds import BoundsIndex
from offload.index.clusters import ClusterIndex
from offload.index.kmeans import spherical_kmeans
from offload.index.residual import ResidualIndex
from offload.sparse.segments import Cut, SegmentSizes

SKIPPED, CHUNK_TOKENS = 64, 64
RECALL_AT = 100
SHARE, TOKENS = 0.01, 300


@dataclass(frozen=True)
class Row:
    """Recall of one method at one moment."""

    shift: str
    temperature: float
    generated: int
    method: str
    budget: str
    recall: float


Search = Callable[[Tensor, int], Hits]
"""From a scaled query ``[1, 1, DIM]`` and a budget to tokens."""


class Grown:
    """An index that grows by segments, each built once."""

    def __init__(self, kind: type[KeyIndex], keys: Tensor, values: Tensor) -> None:
        self._kind, self._keys, self._values = kind, keys, values
        self._parts: dict[tuple[int, int], KeyIndex] = {}

    def at(self, cuts: Sequence[Cut]) -> Search:
        """Return how to search these segments."""
        for cut in cuts:
            if cut not in self._parts:
                keys, values = self._keys[:, slice(*cut)], self._values[:, slice(*cut)]
                self._parts[cut] = self._kind.build(keys, values)
        return self._kind.join([self._parts[cut] for cut in cuts]).search


class FixedClusters:
    """Clusters of the prompt, which all later keys go to."""

    def __init__(self, keys: Tensor) -> None:
        prompt = keys[:, :PROMPT].float()
        self._centroids = spherical_kmeans(prompt, PROMPT // 16)[1]
        directions, rows = normalize(self._centroids, dim=-1), normalize(keys.float(), dim=-1)
        self._assigned = torch.cat(
            [(part @ directions.mT).argmax(-1) for part in rows.split(8192, 1)], 1
        )

    def at(self, cuts: Sequence[Cut]) -> Search:
        """Return how to search the keys of these segments."""
        assigned = self._assigned[:, : cuts[-1][1]]

        def search(query: Tensor, budget: int) -> Hits:
            shares = combine_group(query @ self._centroids.mT)
            return Hits(shares.gather(1, assigned).topk(budget, dim=1).indices, 0)

        return search


class Codebooks:
    """Product quantisation with what was learned from the first keys."""

    def __init__(self, keys: Tensor, num_learned: int, num_books: int, num_entries: int) -> None:
        rows = keys[0].float().unflatten(1, (num_books, -1)).transpose(0, 1)
        sample = rows[:, : num_learned : max(1, num_learned // 16384)]
        places = torch.arange(num_entries) * sample.shape[1] // num_entries
        self._books = sample[:, places]
        for _ in range(8):
            nearest = _nearest(sample, self._books)
            sums = torch.zeros_like(self._books)
            sums.scatter_add_(1, nearest.unsqueeze(-1).expand_as(sample), sample)
            counts = torch.zeros(num_books, num_entries)
            counts.scatter_add_(1, nearest, torch.ones(nearest.shape))
            means = sums / counts.clamp_min(1).unsqueeze(-1)
            self._books = torch.where(counts.unsqueeze(-1) > 0, means, self._books)
        self._codes = torch.cat([_nearest(part, self._books) for part in rows.split(8192, 1)], 1)

    def at(self, cuts: Sequence[Cut]) -> Search:
        """Return how to search the keys of these segments."""
        codes = self._codes[:, : cuts[-1][1]]

        def search(query: Tensor, budget: int) -> Hits:
            products = self._books @ query.view(len(codes), -1, 1)
            scores = products.squeeze(-1).gather(1, codes).sum(0, keepdim=True)
            return Hits(scores.topk(budget, 1).indices, 0)

        return search


def _nearest(rows: Tensor, books: Tensor) -> Tensor:
    return (rows @ books.mT - books.square().sum(-1).unsqueeze(1) / 2).argmax(-1)


def methods(keys: Tensor, values: Tensor) -> dict[str, Callable[[Sequence[Cut]], Search]]:
    """Return how each method searches once these segments are complete."""

    def fresh(cuts: Sequence[Cut]) -> Search:
        rows = slice(cuts[-1][1])
        return ResidualIndex.build(keys[:, rows], values[:, rows]).search

    def relearned(cuts: Sequence[Cut]) -> Search:
        num_keys = cuts[-1][1]
        return Codebooks(keys[:, :num_keys], num_keys, 16, 256).at(cuts)

    return {
        "adaptive, grown": Grown(ResidualIndex, keys, values).at,
        "adaptive, fresh": fresh,
        "retroinfer, grown": Grown(ClusterIndex, keys, values).at,
        "quest, grown": Grown(BoundsIndex, keys, values).at,
        "clusters of the prompt": FixedClusters(keys).at,
        "codebooks 2x64 of the prompt": Codebooks(keys, PROMPT, 2, 64).at,
        "codebooks 16x256 of the prompt": Codebooks(keys, PROMPT, 16, 256).at,
        "codebooks 16x256, relearned": relearned,
    }


def measure(shift: str, temperature: float, every: int) -> Iterator[Row]:
    """Yield the recall of every method every so many generated tokens."""
    text = Text(shift, temperature)
    keys, values = text.keys[None, SKIPPED:], text.values[None, SKIPPED:]
    contenders = methods(keys, values)
    for generated in tqdm(range(0, GENERATED + 1, every), desc=f"{shift}, {temperature:g}"):
        num_keys = PROMPT + generated
        chunks = SegmentSizes().cut((num_keys - 2 * SKIPPED) // CHUNK_TOKENS, CHUNK_TOKENS)
        cuts = [(start * CHUNK_TOKENS, stop * CHUNK_TOKENS) for start, stop in chunks]
        queries = text.ask(num_keys, torch.Generator().manual_seed(generated))
        best = (queries @ keys[0, : cuts[-1][1]].float().T).topk(RECALL_AT).indices
        budgets = {"1 %": int(SHARE * num_keys), "300": TOKENS}
        for method, at in contenders.items():
            search = at(cuts)
            for budget, tokens in budgets.items():
                found = [search(query.view(1, 1, -1), tokens).ids for query in queries]
                recall = fmean(
                    float(torch.isin(wanted, ids).float().mean())
                    for wanted, ids in zip(best, found, strict=True)
                )
                yield Row(shift, temperature, generated, method, budget, recall)


def tables(rows: Sequence[Row]) -> list[str]:
    """Return recall by method and moment, and how far it falls."""
    lines: list[str] = []
    for run in dict.fromkeys((row.shift, row.temperature, row.budget) for row in rows):
        own = [row for row in rows if (row.shift, row.temperature, row.budget) == run]
        moments = sorted({row.generated for row in own})
        shown = [moment for moment in moments if moment % 8192 == 0]
        heads = " | ".join(f"+{moment // 1024}K" for moment in shown)
        lines += [
            f"## Shift: {run[0]}, temperature {run[1]:g}, {run[2]} read\n",
            f"| method | {heads} | lowest | most below the start |",
            "|---" * (len(shown) + 3) + "|",
        ]
        for method in dict.fromkeys(row.method for row in own):
            recall = {row.generated: row.recall for row in own if row.method == method}
            cells = " | ".join(f"{recall[moment]:.3f}" for moment in shown)
            lowest = min(recall.values())
            lines.append(f"| {method} | {cells} | {lowest:.3f} | {recall[0] - lowest:.3f} |")
        lines.append("")
    return lines


def falls(rows: Sequence[Row]) -> list[str]:
    """Return how far the recall of the grown index falls, in points, at worst and on average."""
    table = {(r.shift, r.temperature, r.budget, r.generated, r.method): r.recall for r in rows}
    lines = [
        "| shift | temperature | read | below the start | below fresh | below fresh, mean "
        "| below no shift, mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for shift, temperature, budget in dict.fromkeys(key[:3] for key in table):
        run = (shift, temperature, budget)
        moments = sorted({key[3] for key in table if key[:3] == run})
        grown = [table[*run, moment, "adaptive, grown"] for moment in moments]
        fresh = [table[*run, moment, "adaptive, fresh"] for moment in moments]
        still = [
            table["none", temperature, budget, moment, "adaptive, grown"] for moment in moments
        ]
        behind = [a - b for a, b in zip(fresh, grown, strict=True)]
        points = (
            max(grown[0] - later for later in grown),
            max(behind),
            fmean(behind),
            fmean(a - b for a, b in zip(still, grown, strict=True)),
        )
        cells = " | ".join(f"{100 * value:+.2f}" for value in points)
        lines.append(f"| {shift} | {temperature:g} | {budget} | {cells} |")
    return lines


def machine() -> str:
    """Say what this runs on."""
    return f"torch {torch.__version__}, one thread of {platform.machine()}"


_ABOUT_FALLS = """\
How far the recall of `adaptive, grown` falls, in points of 100. The bar is 1 point over 32K
generated tokens: below the start at the same share read, and below a fresh index. With the same
number of tokens read, recall falls as the context triples; what of that the shift does is in the
last column."""


def markdown(rows: Sequence[Row]) -> str:
    """Return the whole report."""
    parts = [
        (__doc__ or "").strip(),
        f"Measured with {machine()}.",
        _ABOUT_FALLS,
        "\n".join(falls(rows)),
        "\n".join(tables(rows)),
    ]
    return "\n\n".join(parts).rstrip() + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every 2K tokens instead of every 8K")
    parser.add_argument("--json", type=Path, help="write all rows")
    parser.add_argument("--markdown", type=Path, help="write the report")
    options = parser.parse_args(sys.argv[1:])
    torch.set_num_threads(1)
    every = 2048 if options.full else 8192
    rows = [row for shift in SHIFTS for row in measure(shift, 36.0, every)]
    if options.json is not None:
        content = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.markdown is not None:
        options.markdown.write_text(markdown(rows))
    print("\n".join([*falls(rows), "", *tables(rows)]))


if __name__ == "__main__":
    main()
