"""Arithmetic of load, hits and cost: what a simulation has to agree with where a formula exists.

A session has turns, a geometric number of them, with pauses that are exponential; boxes are alike
and sessions stay where they are. Lengths count by their means.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from offload.bench.sim_machine import TIERS, Box
from offload.bench.sim_trace import MOONCAKE_BLOCK_TOKENS
from offload.bench.sim_workload import Workload
from offload.errors import ConfigError

_GIB: Final = 1 << 30
_MONTH_S: Final = 730 * 3600.0
_HALVINGS: Final = 80


@dataclass(frozen=True, slots=True)
class Turn:
    """The mean turn of a workload.

    Attributes
    ----------
    input_tokens, output_tokens : float
    shared_tokens : float
        Of the system's prompt, which are taken to be on the device.
    reused_tokens : float
        Of what the session's last turn left; 0 in first turns.
    new_tokens : float
        Written for others to read: all that any prompt of a session has, once.
    more : float
        Share of turns that another follows.
    think_s : float
    """

    input_tokens: float
    output_tokens: float
    shared_tokens: float
    reused_tokens: float
    new_tokens: float
    more: float
    think_s: float

    @property
    def own_tokens(self) -> float:
        """What it leaves, without what others share."""
        return self.input_tokens + self.output_tokens - self.shared_tokens


def mean_turn(workload: Workload, block_tokens: int = MOONCAKE_BLOCK_TOKENS) -> Turn:
    """Return the mean turn, as if sessions ended only by chance.

    Of all turns of sessions with a geometric number of turns, mean N, the mean number of turns
    before is N - 1; among those that have any it is N. Only whole blocks are found again: half a
    block is lost on average.
    """
    more = 1 - 1 / workload.turns
    grows = workload.output_tokens + workload.more_tokens
    begins = workload.system_tokens + workload.first_tokens
    kept = begins - workload.system_tokens + workload.turns * grows - workload.more_tokens
    kept -= block_tokens / 2
    lasts = workload.first_tokens + (workload.turns - 1) * grows
    return Turn(
        input_tokens=begins + (workload.turns - 1) * grows,
        output_tokens=workload.output_tokens,
        shared_tokens=workload.system_tokens,
        reused_tokens=more * kept,
        new_tokens=(lasts - block_tokens / 2) / workload.turns,
        more=more,
        think_s=workload.think_s,
    )


def distinct_tokens(turn: Turn, turns_per_s: float, reach_s: float) -> float:
    """Return how many tokens of sessions a box has used in its last seconds, each counted once.

    A turn of age a is its session's last so far with chance 1 - more + more * exp(-a / think).
    """
    ended_s = (1 - turn.more) * reach_s
    resting_s = turn.more * turn.think_s * -math.expm1(-reach_s / turn.think_s)
    return turns_per_s * turn.own_tokens * (ended_s + resting_s)


def reach_s(turn: Turn, turns_per_s: float, capacity_tokens: float) -> float:
    """Return for how long a tier remembers what was used: where distinct tokens fill it."""
    low, high = 0.0, 1.0
    while distinct_tokens(turn, turns_per_s, high) < capacity_tokens:
        high *= 2
        if high > 1e12:
            return math.inf
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if distinct_tokens(turn, turns_per_s, middle) < capacity_tokens:
            low = middle
        else:
            high = middle
    return high


def hit_tokens(box: Box, turn: Turn, turns_per_s: float) -> dict[str, float]:
    """Return the tokens of a mean turn that each tier of a box has; what none has is missing.

    A session's pause is shorter than a tier's reach with chance 1 - exp(-reach / think).
    """
    found, before = {}, 0.0
    for tier in TIERS[:-1]:
        capacity = box.capacity_bytes(tier) / box.token_bytes - turn.shared_tokens
        chance = 0.0
        if capacity > 0:
            chance = -math.expm1(-reach_s(turn, turns_per_s, capacity) / turn.think_s)
        found[tier] = turn.reused_tokens * max(0.0, chance - before)
        before = max(before, chance)
    found["device"] += turn.shared_tokens
    return found


def most_rows(box: Box, turn: Turn) -> int:
    """Return how many answers are computed side by side, by the device's memory or the engine."""
    context = turn.input_tokens + turn.output_tokens
    return max(1, min(box.max_running, int(box.device_bytes / (context * box.token_bytes))))


def demands_s(box: Box, turn: Turn, hits: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of service that a mean turn asks of every part of a full box."""
    known = sum(hits.values())
    computed = max(1.0, turn.input_tokens - known)
    rows = most_rows(box, turn)
    context = turn.input_tokens + turn.output_tokens / 2
    prefill_s = box.prefill_s * math.ceil(computed / box.piece_tokens)
    prefill_s += box.prefill_token_s * computed
    prefill_s += box.prefill_pair_s * computed * (known + computed / 2)
    decode_s = turn.output_tokens * box.step_s(rows, rows * context) / rows
    written = turn.new_tokens
    disk_s = hits["disk"] * box.token_bytes / box.disk_read_bytes_per_s
    disk_s += written * box.token_bytes / box.disk_write_bytes_per_s * (box.disk_bytes > 0)
    return {
        "compute": box.request_s + prefill_s + decode_s,
        "bus": (hits["host"] + hits["disk"]) * box.token_bytes / box.bus_bytes_per_s,
        "disk": disk_s,
        "net_out": written * box.token_bytes / box.net_bytes_per_s * (box.remote_bytes > 0),
        "store_in": written * box.token_bytes / box.store_bytes_per_s * (box.remote_bytes > 0),
    }


def most_turns_per_s(box: Box, turn: Turn, num_boxes: int = 1) -> tuple[float, str]:
    """Return the load of one box at which the first part is full, and which that is.

    Hits depend on the load, and the load on hits: the load is halved in until both agree. A store
    serves all boxes, so each has a share of it.
    """
    low, high, part = 0.0, 1e6, "compute"
    for _ in range(_HALVINGS):
        load = (low + high) / 2
        needs = demands_s(box, turn, hit_tokens(box, turn, load))
        needs["store_in"] *= num_boxes
        part = max(needs, key=lambda name: needs[name])
        if load * needs[part] > 1:
            high = load
        else:
            low = load
    return low, part


def queue_s(service_s: float, utilisation: float) -> float:
    """Return the mean wait before a link: fixed service, random arrivals (M/D/1).

    Raises
    ------
    ConfigError
        The utilisation is not in [0, 1).
    """
    if not 0 <= utilisation < 1:
        raise ConfigError(f"a link at a utilisation of {utilisation} has no mean wait")
    return utilisation * service_s / (2 * (1 - utilisation))


@dataclass(frozen=True, slots=True)
class Prices:
    """Assumptions, not quotes: round numbers of November 2026, to be replaced by one's own.

    Attributes
    ----------
    box_usd_per_hour : float
    device, host, disk, remote : float
        US dollars for a GiB and a month.
    """

    box_usd_per_hour: float = 3.0
    device: float = 25.0
    host: float = 2.0
    disk: float = 0.1
    remote: float = 0.023

    def __post_init__(self) -> None:
        values = (self.box_usd_per_hour, self.device, self.host, self.disk, self.remote)
        if min(values) < 0:
            raise ConfigError(f"prices are not below 0: {self}")

    def kept_usd(self, token_bytes: int, tier: str) -> float:
        """Return the price of keeping a million tokens for a month."""
        return 1e6 * token_bytes / _GIB * float(getattr(self, tier))

    def computed_usd(self, box: Box, num_tokens: float) -> float:
        """Return the price of computing a million tokens again, in prompts of so many."""
        token_s = box.prefill_token_s + box.prefill_pair_s * num_tokens / 2
        token_s += box.prefill_s / box.piece_tokens
        return 1e6 * token_s * self.box_usd_per_hour / 3600

    def break_even_s(self, box: Box, tier: str, num_tokens: float) -> float:
        """Return how long a million tokens are kept for what computing them once costs."""
        kept = self.kept_usd(box.token_bytes, tier)
        return self.computed_usd(box, num_tokens) / kept * _MONTH_S if kept else math.inf
