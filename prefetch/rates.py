"""What work costs on this machine: measured at start, followed as moving averages.

Work is named; amounts are of one layer with all its KV heads:

================= ======= =======================================================================
name              amount  work
================= ======= =======================================================================
``attend.gpu``    tokens  attention to whole chunks where they lie, on the device
``attend.cpu``    tokens  the same on the host, its result moved to the device
``search``        tokens  search of an index over so many, and the estimate of what is not read
``gather.<tier>`` tokens  single tokens read from a tier, all KV heads, and attended
``load.<tier>``   bytes   whole chunks moved from a tier to the device
================= ======= =======================================================================
"""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from offload.errors import ConfigError

_MEMORY_S: Final = 0.25
"""Seconds of work over which a cost is averaged: some dozen layers of a step of 128K tokens, and
about as long as a machine's load takes to change."""

_LEAST_S: Final = 1e-9
"""What a clock may fail to tell from nothing."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Time as a line over the amount of work; no work takes no time.

    Attributes
    ----------
    fixed_s : float
        Seconds, however little the work is.
    unit_s : float
        Seconds for each token or byte.
    """

    fixed_s: float
    unit_s: float

    def seconds(self, amount: float) -> float:
        """Return how long so much work takes."""
        return self.fixed_s + amount * self.unit_s if amount > 0 else 0.0


class Rates:
    """Costs of the kinds of work that a machine does, for the chunks of one layout.

    A cost keeps the shape it was measured with; what is followed is one factor for each kind, by
    which the machine is now slower than at start. So one size of work, over and over, as decoding
    brings it, is enough to learn from.

    Any thread may call any method. ``observe`` takes a lock for about a microsecond; reading takes
    none, and sees one cost whole.

    Parameters
    ----------
    start : mapping of str to Cost
        By name, see the module. Work that the machine cannot do is not in it.
    token_bytes : int
        Of the keys and values of one token of one layer.
    is_shared : bool
        Whether host and device are the same cores and memory, so that work on one delays the other.

    Raises
    ------
    ConfigError
        A cost is not positive and finite.
    """

    def __init__(self, start: Mapping[str, Cost], token_bytes: int, *, is_shared: bool) -> None:
        for name, cost in start.items():
            if not (0 <= cost.fixed_s < math.inf and 0 < cost.unit_s < math.inf):
                raise ConfigError(f"{name} costs {cost.fixed_s} s + {cost.unit_s} s per unit")
        self.token_bytes = token_bytes
        self.is_shared = is_shared
        self._start = dict(start)
        self._now = dict(start)
        self._log_factor = dict.fromkeys(start, 0.0)
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._now

    def cost(self, name: str) -> Cost:
        """Return what work costs now.

        Raises
        ------
        ConfigError
            The machine does no such work.
        """
        try:
            return self._now[name]
        except KeyError:
            known = ", ".join(sorted(self._now))
            raise ConfigError(f"there is no rate of {name!r}, only of {known}") from None

    def costs(self) -> dict[str, Cost]:
        """Return what everything costs now, by name."""
        return dict(self._now)

    def observe(self, name: str, amount: float, seconds: float) -> None:
        """Take note of how long some work took.

        The logarithm of measured over expected time is averaged, weighted by the expected time: a
        stall of a hundred times what was expected then counts for less than twice five of ten.

        Parameters
        ----------
        name : str
        amount : float
            Tokens or bytes, see the module. Of no work nothing is learnt.
        seconds : float

        Raises
        ------
        ConfigError
            The machine does no such work, or amount or seconds is negative or not finite.
        """
        self.cost(name)
        if not (0 <= amount < math.inf and 0 <= seconds < math.inf):
            raise ConfigError(f"{name}: {amount} units in {seconds} s cannot have been measured")
        if amount == 0:
            return
        start = self._start[name]
        expected_s = start.seconds(amount)
        weight = -math.expm1(-expected_s / _MEMORY_S)
        found = math.log(max(seconds, _LEAST_S) / expected_s)
        with self._lock:
            mean = self._log_factor[name] + weight * (found - self._log_factor[name])
            self._log_factor[name] = mean
            factor = math.exp(mean)
            self._now[name] = Cost(start.fixed_s * factor, start.unit_s * factor)
