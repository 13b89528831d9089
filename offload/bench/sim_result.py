"""What a simulation found."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from offload.bench.sim_machine import TIERS


@dataclass(slots=True)
class Outcome:
    """What became of one request.

    Attributes
    ----------
    index : int
        In the trace.
    arrival_s : float
        When it was made: not before the answer to the session's last one had ended.
    first_s, end_s : float
        When its first and its last token came.
    hits : dict of str to int
        Tokens of the prompt that needed no prefill, by tier.
    """

    index: int
    box: int
    arrival_s: float
    hits: dict[str, int]
    input_tokens: int
    output_tokens: int
    first_s: float = math.nan
    end_s: float = math.nan

    @property
    def ttft_s(self) -> float:
        """Seconds from the request to its first token."""
        return self.first_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class Counts:
    """What every kind of part has done, all boxes together, by its name.

    Attributes
    ----------
    busy_s : dict of str to float
        Service given.
    num_bytes, num_operations : dict of str to int
        Moved over links, and in how many blocks.
    """

    busy_s: dict[str, float] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)
    num_operations: dict[str, int] = field(default_factory=dict)

    def __sub__(self, before: "Counts") -> "Counts":
        """Return what was done since."""
        return Counts(
            {name: value - before.busy_s.get(name, 0.0) for name, value in self.busy_s.items()},
            {name: value - before.num_bytes.get(name, 0) for name, value in self.num_bytes.items()},
            {
                name: value - before.num_operations.get(name, 0)
                for name, value in self.num_operations.items()
            },
        )


@dataclass(frozen=True, slots=True)
class SimResult:
    """All of it.

    Attributes
    ----------
    num_boxes : int
    outcomes : tuple of Outcome
        In the order of the trace.
    gaps : tuple of (float, int)
        Seconds between two tokens of an answer, and how often.
    counts : Counts
    num_servers : dict of str to int
        How many there are of each part.
    span_s : float
        From the first arrival to the last token, or of the window that was asked for.
    """

    num_boxes: int
    outcomes: tuple[Outcome, ...]
    gaps: tuple[tuple[float, int], ...]
    counts: Counts
    num_servers: dict[str, int]
    span_s: float

    @property
    def utilisation(self) -> dict[str, float]:
        """Share of its time that each part gives service, mean over boxes.

        Of ``compute``: the share that it would work if its batches were as large as can be.
        """
        return {
            name: busy_s / (self.num_servers[name] * self.span_s)
            for name, busy_s in self.counts.busy_s.items()
        }

    @property
    def busiest(self) -> str:
        """The resource that saturates first."""
        return max(self.utilisation.items(), key=lambda item: item[1])[0]

    @property
    def hit_share(self) -> dict[str, float]:
        """Tokens of prompts that each tier had, as shares of all."""
        total = sum(each.input_tokens for each in self.outcomes)
        return {tier: sum(each.hits[tier] for each in self.outcomes) / total for tier in TIERS}

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens generated per second, all boxes together."""
        return sum(each.output_tokens for each in self.outcomes) / self.span_s

    @property
    def bytes_per_s(self) -> dict[str, float]:
        """What each kind of link carries, all boxes together."""
        moved = self.counts.num_bytes
        return {name: moved[name] / self.span_s for name in moved}

    @property
    def operations_per_s(self) -> dict[str, float]:
        """Blocks over each kind of link, all boxes together."""
        moved = self.counts.num_operations
        return {name: moved[name] / self.span_s for name in moved}

    def ttft_s(self, share: float) -> float:
        """Return a quantile of the time to the first token."""
        return quantile(((each.ttft_s, 1) for each in self.outcomes), share)

    def tbt_s(self, share: float) -> float:
        """Return a quantile of the time between tokens; 0 if no answer has two."""
        return quantile(self.gaps, share)

    def to_json(self) -> dict[str, Any]:
        """Return the figures, without the single requests."""
        return {
            "boxes": self.num_boxes,
            "requests": len(self.outcomes),
            "span_s": self.span_s,
            "input_tokens": sum(each.input_tokens for each in self.outcomes),
            "output_tokens": sum(each.output_tokens for each in self.outcomes),
            "output_tokens_per_s": self.output_tokens_per_s,
            "hit_share": self.hit_share,
            "ttft_s": {f"p{int(100 * q)}": self.ttft_s(q) for q in (0.5, 0.9, 0.99)},
            "tbt_s": {f"p{int(100 * q)}": self.tbt_s(q) for q in (0.5, 0.9, 0.99)},
            "utilisation": self.utilisation,
            "bytes_per_s": self.bytes_per_s,
            "operations_per_s": self.operations_per_s,
            "busiest": self.busiest,
        }


def quantile(values: Iterable[tuple[float, int]], share: float) -> float:
    """Return the least value that so large a share of the weight does not exceed; 0 of none."""
    ordered: Sequence[tuple[float, int]] = sorted(values)
    wanted = share * sum(weight for _, weight in ordered)
    seen = 0
    for value, weight in ordered:
        seen += weight
        if seen >= wanted:
            return value
    return 0.0
