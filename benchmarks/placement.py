"""Which placement policy finds most in memory: attention replayed against tiers of 5:15:80.

A layer is one KV head with 8 query heads of a parametric context (flat, medium and sharp in turn),
each of which keeps what it looks for from one step to the next with probability 0.95 and drifts
meanwhile (correlation 0.9). The chunk of the sinks and the latest one are always on the device and
are left out. Every step reads, of every layer, the share of chunks that gets most attention, and a
policy learns the attention of what is read, no more. Shares of layers are those of CAKE over the
steps of the warm-up.

    python -m benchmarks.placement [--tokens 16384 32768] [--read 0.05 0.1] [--json FILE]
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.table import Table
from tqdm import tqdm

from benchmarks.placement_replay import Farthest, Tally, Tiers, Trace, mean_tally, replay
from offload.bench.contexts import make_context
from offload.bench.shapes import ModelShape
from offload.tiers.eviction import LeastRecentlyUsed, Ranking
from offload.tiers.eviction_admission import SecondHit
from offload.tiers.eviction_cumulative import LeastCumulativeMass
from offload.tiers.eviction_layers import ByLayer
from offload.tiers.eviction_mass import LeastMass
from offload.tiers.eviction_recurrence import LongestOverdue
from offload.tiers.layer_shares import layer_preference, layer_shares

CHUNK_TOKENS, WARM_UP_STEPS = 64, 32
HEADS = ModelShape("placement", "llama", 24, 3, 128, 0, 0)
DEVICE_SHARE, HOST_SHARE = 0.05, 0.15
LEAST_SHARE = 0.25
"""Of an equal share, that a layer has whatever CAKE says."""

_PIECE = 16

POLICIES: dict[str, Callable[[], Ranking]] = {
    "LRU": LeastRecentlyUsed,
    "H2O, cumulative mass": LeastCumulativeMass,
    "mass, moving average": LeastMass,
    "recurrence": LongestOverdue,
}


@dataclass(frozen=True)
class Row:
    """One policy on contexts of one size, of which some share is read."""

    num_tokens: int
    read: float
    policy: str
    tally: Tally


def make_trace(num_tokens: int, num_steps: int, num_layers: int, share: float, seed: int) -> Trace:
    """Return the attention of so many layers to the chunks of a context."""
    per_head = -(-num_layers // HEADS.num_kv_heads)
    context = make_context(HEADS, num_tokens, num_steps, num_layers=per_head, seed=seed)
    group = HEADS.num_heads // HEADS.num_kv_heads
    layers = []
    for layer in range(num_layers):
        head, number = layer % HEADS.num_kv_heads, layer // HEADS.num_kv_heads
        keys = context.keys[head, :num_tokens].float().T / HEADS.head_dim**0.5
        queries = context.queries[:, number, 0, head * group : (head + 1) * group].float()
        pieces = [
            (piece @ keys).softmax(-1).mean(1).unflatten(1, (-1, CHUNK_TOKENS)).sum(-1)
            for piece in queries.split(_PIECE)
        ]
        layers.append(torch.cat(pieces)[:, 1:-1])
    masses = torch.stack(layers, 1)
    return Trace(masses, max(1, round(share * masses.shape[2])))


def cake_shares(trace: Trace, num_steps: int) -> list[float]:
    """Return the shares of the layers by their attention in the first steps."""
    rows = trace.masses[:num_steps].unbind(1)
    return layer_shares([layer_preference(each) for each in rows], LEAST_SHARE)


def measure(trace: Trace, warm_up: int) -> Iterator[tuple[str, Tally]]:
    """Yield what every policy finds."""
    rooms = [round(share * trace.num_chunks) for share in (DEVICE_SHARE, HOST_SHARE)]
    shares = cake_shares(trace, warm_up)

    def share_out(tiers: Tiers) -> None:
        for policy in tiers.policies:
            assert isinstance(policy, ByLayer)
            policy.set_shares(shares)

    for name, make_policy in POLICIES.items():
        yield name, replay(trace, Tiers(trace.num_chunks, rooms, make_policy), warm_up)
        by_layer = partial(ByLayer, make_policy, trace.layer_of)
        tiers = Tiers(trace.num_chunks, rooms, by_layer)
        yield f"{name}, CAKE shares", replay(trace, tiers, warm_up, share_out)
    tiers = Tiers(trace.num_chunks, rooms, LeastMass, SecondHit())
    yield "mass, moving average, second hit", replay(trace, tiers, warm_up)
    limit = Tiers(trace.num_chunks, rooms, partial(Farthest, trace))
    yield "limit: Belady", replay(trace, limit, warm_up)


def table(rows: list[Row]) -> Table:
    """Return the rows of one context for people."""
    found = Table("policy", show_edge=False)
    for name in ("device", "host", "from disk", "mass in memory", "moved"):
        found.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        tally = row.tally
        shares = (f"{tally.device:.1%}", f"{tally.host:.1%}", f"{tally.disk_chunks:.1f}")
        found.add_row(row.policy, *shares, f"{tally.mass:.1%}", f"{tally.moved_chunks:.1f}")
    return found


def show(renderable: RenderableType) -> None:
    """Print without the spaces that rich fills lines with."""
    console = Console(width=100, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), flush=True)


def compare(num_tokens: int, read: float, options: argparse.Namespace) -> list[Row]:
    """Measure all policies on contexts of one size, and show what they find."""
    found: dict[str, list[Tally]] = {}
    for seed in tqdm(range(options.seeds), desc=f"{num_tokens} tokens", leave=False):
        num_steps = WARM_UP_STEPS + options.steps
        trace = make_trace(num_tokens, num_steps, options.layers, read, seed)
        for name, tally in measure(trace, WARM_UP_STEPS):
            found.setdefault(name, []).append(tally)
    rows = [Row(num_tokens, read, name, mean_tally(tallies)) for name, tallies in found.items()]
    num_read = trace.num_read * trace.num_layers
    show(f"\n{num_tokens} tokens: {trace.num_chunks} chunks, {num_read} of them read per step\n")
    show(table(rows))
    shares = ", ".join(f"{share:.2f}" for share in cake_shares(trace, WARM_UP_STEPS))
    show(f"\nCAKE shares of the layers, flat, medium and sharp in turn: {shares}")
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--steps", type=int, default=200, help="after the warm-up")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument(
        "--read", type=float, nargs="+", default=[0.05, 0.1], help="shares of a layer's chunks"
    )
    parser.add_argument("--seeds", type=int, default=3, help="contexts to take the mean of")
    parser.add_argument("--json", type=Path, help="write all rows")
    options = parser.parse_args(sys.argv[1:])
    torch.set_num_threads(1)
    show(" ".join(["python -m benchmarks.placement", *sys.argv[1:]]))
    show(
        f"{options.seeds} contexts, {options.layers} layers, chunks of {CHUNK_TOKENS} tokens, "
        f"{options.steps} steps after {WARM_UP_STEPS} of warm-up. Device {DEVICE_SHARE:.0%}, host "
        f"{HOST_SHARE:.0%} of all chunks. Device and host: shares of what is read that are found "
        "there. From disk, moved: chunks per step."
    )
    rows = [
        row
        for num_tokens, read in product(options.tokens, options.read)
        for row in compare(num_tokens, read, options)
    ]
    if options.json is not None:
        data = {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
