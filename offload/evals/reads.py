"""How much of the context was read, of all that the tokens of questions and answers could see."""

from collections.abc import Sequence
from dataclasses import dataclass

from offload.cache import OffloadedCache
from offload.layers import OffloadedLayer
from offload.sparse.plan import SparsePlan
from offload.stats import CacheStats


@dataclass(frozen=True, slots=True)
class Call:
    """One forward pass: how many tokens it ran, after how many."""

    num_past: int
    num_tokens: int

    @property
    def visible_tokens(self) -> int:
        """Tokens that its tokens see, itself included, added up."""
        return self.num_tokens * self.num_past + self.num_tokens * (self.num_tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class Reads:
    """What was read per layer and KV head, means over both.

    Attributes
    ----------
    num_positions : int
        Tokens that asked.
    visible_tokens, read_tokens : float
        What they saw, and what of it was read, sinks and window included; added up.
    """

    num_positions: int
    visible_tokens: int
    read_tokens: float

    @property
    def share(self) -> float:
        """What was read, of what was visible."""
        return self.read_tokens / self.visible_tokens if self.visible_tokens else 1.0


def count_reads(
    cache: OffloadedCache,
    plan: SparsePlan | None,
    calls: Sequence[Call],
    before: CacheStats,
    after: CacheStats,
    *,
    num_kv_heads: int,
    chunk_tokens: int,
) -> Reads:
    """Count what some calls read.

    Parameters
    ----------
    cache : OffloadedCache
    plan : SparsePlan or None
        Of the policy, if it has one.
    calls : sequence of Call
        On any fork of the cache.
    before, after : CacheStats
        Between them were these calls, and no other sparse ones.
    num_kv_heads, chunk_tokens : int
    """
    visible = sum(call.visible_tokens for call in calls)
    num_layers = sum(isinstance(layer, OffloadedLayer) for layer in cache.layers)
    per_layer = after.covered_tokens - before.covered_tokens
    per_layer -= after.retrieved_tokens - before.retrieved_tokens
    skipped = per_layer / (num_layers * num_kv_heads)
    if plan is not None and plan.index is None:
        sparse_layers = num_layers - plan.dense_layers
        skipped = sum(_left_out(plan, call, chunk_tokens) for call in calls)
        skipped *= sparse_layers / num_layers
    return Reads(sum(call.num_tokens for call in calls), visible, visible - skipped)


def _left_out(plan: SparsePlan, call: Call, chunk_tokens: int) -> int:
    """Return the tokens that a plan without an index leaves out; the runtime counts them not."""
    context = call.num_past + call.num_tokens
    ripe = plan.ripe(call.num_past // chunk_tokens, chunk_tokens, context, 0)
    return call.num_tokens * chunk_tokens * len(plan.covered(ripe, chunk_tokens))
