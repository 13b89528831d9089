"""Dense or sparse, fetched up or attended in place: decided by cost. Pure.

Amounts are tokens of one layer with all its KV heads; costs come from ``prefetch.rates``. Every
function is total: no work takes no time, and a plan never names more than there is.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from offload.prefetch.rates import Cost, Rates

Attention = Literal["dense", "sparse"]


class Split(NamedTuple):
    """What becomes of the units (tokens, chunks) that one tier holds.

    Attributes
    ----------
    fetched, in_place : int
        Units that move up to the device, and units attended where they are.
    seconds : float
        Until both are done.
    """

    fetched: int
    in_place: int
    seconds: float


class StepPlan(NamedTuple):
    """The cheaper way to attend one layer in one step.

    Attributes
    ----------
    attention : {"dense", "sparse"}
    dense_s, sparse_s : float
        What either takes.
    """

    attention: Attention
    dense_s: float
    sparse_s: float

    @property
    def seconds(self) -> float:
        """What the cheaper one takes."""
        return min(self.dense_s, self.sparse_s)


def choose_attention(
    num_context: int,
    budget_tokens: int,
    rates: Rates,
    residency: Mapping[str, int] | None = None,
) -> Attention:
    """Say whether a layer is attended to in full, or searched and read sparsely; see ``plan_step``.

    Takes some microseconds.
    """
    return plan_step(num_context, budget_tokens, rates, residency).attention


def plan_step(
    num_context: int,
    budget_tokens: int,
    rates: Rates,
    residency: Mapping[str, int] | None = None,
) -> StepPlan:
    """Compare reading everything with searching, reading a budget and estimating the rest.

    Dense takes what ``dense_seconds`` says. Sparse takes ``search(num_context)`` and then, from
    each tier, ``gather(budget_tokens * share of the tier)``: the hits are where the context is. The
    disk's reads overlap those of memory. Equal is dense, which estimates nothing.

    Parameters
    ----------
    num_context : int
        Tokens that may be read sparsely.
    budget_tokens : int
        Those of them that a sparse step reads; no more than there are.
    rates : Rates
        Without ``search``, or without ``gather`` of a tier that is needed, the answer is dense.
    residency : mapping of str to int, optional
        Tier to tokens of the context that it holds; by default the device has them all.
    """
    held = {"gpu": num_context} if residency is None else residency
    dense_s = dense_seconds(held, rates)
    sparse_s = _sparse_seconds(num_context, min(budget_tokens, num_context), held, rates)
    return StepPlan("dense" if dense_s <= sparse_s else "sparse", dense_s, sparse_s)


def break_even_tokens(budget: float | int, rates: Rates, limit: int = 1 << 20) -> int:
    """Return the longest context, up to ``limit``, that is best attended to in full.

    Parameters
    ----------
    budget : float or int
        What a sparse step reads: a share of the context if it is a float, else tokens.
    rates : Rates
        All of the context is on the device.
    limit : int
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        tokens = budget if isinstance(budget, int) else max(1, int(budget * middle))
        if choose_attention(middle, tokens, rates) == "dense":
            low = middle
        else:
            high = middle - 1
    return low


def dense_seconds(held: Mapping[str, int], rates: Rates) -> float:
    """Return how long attention to everything takes, split as ``plan_tiers`` splits it.

    The device attends to what it has and what is fetched, every tier's link and the host work
    meanwhile, and the slowest decides. Where host and device are one, their work adds up, and only
    the disk works beside it.

    Parameters
    ----------
    held : mapping of str to int
        Tier to tokens.
    rates : Rates
    """
    splits = plan_tiers(held, rates)
    below_s = {tier: split.seconds for tier, split in splits.items() if tier != "gpu"}
    if rates.is_shared:
        cores_s = rates.cost("attend.gpu").seconds(sum(held.values()))
        if "cpu" in splits:
            cores_s += _load(rates, "cpu").seconds(splits["cpu"].fetched)
        return max(cores_s, below_s.get("disk", 0.0))
    on_device = held.get("gpu", 0) + sum(split.fetched for split in splits.values())
    return max([rates.cost("attend.gpu").seconds(on_device), *below_s.values()])


def plan_tiers(wanted: Mapping[str, int], rates: Rates) -> dict[str, Split]:
    """Say for each tier what is fetched up and what is attended in place.

    The device attends to what it has. A tier whose keys the machine can attend to where they are
    (``attend.<tier>`` is known) divides the work so that link and tier finish together; the others
    send everything up.

    Parameters
    ----------
    wanted : mapping of str to int
        Tier (``gpu``, ``cpu``, ``disk``) to the tokens that it holds and that are to be attended.
    rates : Rates

    Returns
    -------
    dict of str to Split
        Of the same tiers, in tokens.
    """
    plan = {}
    for tier, num_tokens in wanted.items():
        in_place = rates.cost(f"attend.{tier}") if f"attend.{tier}" in rates else None
        if tier == "gpu":
            seconds = rates.cost("attend.gpu").seconds(num_tokens)
            plan[tier] = Split(0, max(0, num_tokens), seconds)
            continue
        fetch = pipelined(_load(rates, tier), rates.cost("attend.gpu"))
        if rates.is_shared and tier == "cpu":
            fetch = one_by_one(_load(rates, tier), rates.cost("attend.gpu"))
        plan[tier] = split_units(num_tokens, fetch, in_place, overlaps=not rates.is_shared)
    return plan


def split_units(
    num_units: int, fetch: Cost, in_place: Cost | None, *, overlaps: bool = True
) -> Split:
    """Divide units between fetching and attending in place so that both finish together.

    With ``n`` units of which ``f`` are fetched, the time is ``max(fetch(f), in_place(n - f))``:
    a rising and a falling line, lowest at ``f = (in_place(n) - fetch.fixed) / (sum of the slopes)``
    or, since either line drops to nothing when there is no work, at one of the ends.

    Parameters
    ----------
    num_units : int
    fetch, in_place : Cost
        Of one unit each way, whatever comes after it included; None: it cannot be done in place.
    overlaps : bool
        Whether the two go on at the same time. If not, the cheaper one takes everything.
    """
    num_units = max(0, num_units)
    choices = {num_units}
    if in_place is not None:
        choices.add(0)
        slopes = fetch.unit_s + in_place.unit_s
        if overlaps and 0 < slopes < math.inf:
            crossing = (in_place.seconds(num_units) - fetch.fixed_s) / slopes
            # Rounding in the crossing may be more than a unit, but never leads out of the ends.
            low = min(max(math.floor(crossing), 0), num_units)
            choices |= {low, min(low + 1, num_units)}

    def seconds(fetched: int) -> float:
        rest = 0.0 if in_place is None else in_place.seconds(num_units - fetched)
        return max(fetch.seconds(fetched), rest)

    # Of equals the one that moves least.
    best = min(sorted(choices), key=seconds)
    return Split(best, num_units - best, seconds(best))


def pipelined(first: Cost, then: Cost) -> Cost:
    """Return the cost of two kinds of work done at the same time, one unit after the other."""
    return Cost(first.fixed_s + then.fixed_s, max(first.unit_s, then.unit_s))


def one_by_one(first: Cost, then: Cost) -> Cost:
    """Return the cost of two kinds of work of which only one goes on at a time."""
    return Cost(first.fixed_s + then.fixed_s, first.unit_s + then.unit_s)


def _load(rates: Rates, tier: str) -> Cost:
    """Return the cost of moving one token up, from that of bytes."""
    cost = rates.cost(f"load.{tier}")
    return Cost(cost.fixed_s, cost.unit_s * rates.token_bytes)


def _sparse_seconds(
    num_context: int, budget_tokens: int, held: Mapping[str, int], rates: Rates
) -> float:
    names = {tier: f"gather.{tier}" for tier, tokens in held.items() if tokens > 0}
    if "search" not in rates or any(name not in rates for name in names.values()):
        return math.inf
    total = max(1, sum(held[tier] for tier in names))
    read_s = {
        tier: rates.cost(name).seconds(budget_tokens * held[tier] / total)
        for tier, name in names.items()
    }
    disk_s = read_s.pop("disk", 0.0)
    return rates.cost("search").seconds(num_context) + max(disk_s, sum(read_s.values()))
