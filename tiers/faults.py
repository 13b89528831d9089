"""Which faults to inject and how often, and how many were. Nouns only."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Final, Self

from offload.errors import ConfigError

TIMED: Final = ("delay", "hang")
"""Faults that hold a transfer back; each has a duration."""

AT_REST: Final = ("truncate", "flip")
"""Faults that change a record where it lies."""

KINDS: Final = (*TIMED, "fail", "full", *AT_REST)
"""Every kind of fault, in the order in which reports show them."""

_NONE: Final = "none"


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """How often each kind of fault strikes. The rates are probabilities, from 0 to 1.

    Attributes
    ----------
    seed : int
        The same seed and the same order of calls give the same faults.
    delay : float
        Of a transfer: it ends ``delay_s`` late.
    hang : float
        Of a transfer: it makes no progress for ``hang_s``, which should exceed the deadline of
        whoever waits.
    fail : float
        Of a transfer: it moves nothing and raises StorageError with ``EIO``.
    full : float
        Of a write: it moves nothing and raises DiskFull with ``ENOSPC``.
    truncate : float
        Of a record: once it is written, its tail is zeroed, from a random page on.
    flip : float
        Of a record: once it is written, one bit of it is inverted.
    delay_s, hang_s : float
        Seconds.

    Raises
    ------
    ConfigError
        A rate is no probability, or a duration is negative or not finite.
    """

    seed: int = 0
    delay: float = 0.0
    hang: float = 0.0
    fail: float = 0.0
    full: float = 0.0
    truncate: float = 0.0
    flip: float = 0.0
    delay_s: float = 0.005
    hang_s: float = 1.0

    def __post_init__(self) -> None:
        for kind in KINDS:
            if not 0.0 <= getattr(self, kind) <= 1.0:
                raise ConfigError(f"the rate of {kind} is {getattr(self, kind)}, not from 0 to 1")
        for kind in TIMED:
            seconds = getattr(self, f"{kind}_s")
            if not 0.0 <= seconds < math.inf:
                raise ConfigError(f"a {kind} of {seconds} s is impossible: 0 or more, and finite")

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Self:
        """Read a plan from text.

        Parameters
        ----------
        text : str
            ``kind=rate`` pairs between commas, such as ``"flip=0.01,fail=0.02"``; ``delay`` and
            ``hang`` take seconds as well, ``"delay=0.1:0.005"``. Or ``"none"``.
        seed : int

        Raises
        ------
        ConfigError
            Names the part that is no such pair.
        """
        values: dict[str, float] = {}
        for part in [] if text.strip() == _NONE else text.split(","):
            kind, _, numbers = (word.strip() for word in part.partition("="))
            rate, *seconds = numbers.split(":")
            if kind not in KINDS or len(seconds) > (kind in TIMED):
                raise _not_a_fault(part)
            if kind in values:
                raise ConfigError(f"{kind} is given twice in {text!r}")
            values[kind] = _number(rate, part)
            values |= {f"{kind}_s": _number(found, part) for found in seconds}
        return cls(seed, **values)

    def __str__(self) -> str:
        """Return the text form, without the seed."""
        parts = []
        for kind in KINDS:
            if rate := getattr(self, kind):
                seconds = f":{getattr(self, f'{kind}_s'):g}" if kind in TIMED else ""
                parts.append(f"{kind}={rate:g}{seconds}")
        return ",".join(parts) or _NONE

    @property
    def damages_records(self) -> bool:
        """Whether some fault changes records where they lie."""
        return any(getattr(self, kind) for kind in AT_REST)


@dataclass(slots=True)
class FaultCounts:
    """How many faults of each kind were injected, ``truncate`` and ``flip`` by record."""

    delay: int = 0
    hang: int = 0
    fail: int = 0
    full: int = 0
    truncate: int = 0
    flip: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))

    def __add__(self, other: "FaultCounts") -> "FaultCounts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return FaultCounts(*map(sum, pairs))


def _number(text: str, part: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _not_a_fault(part) from None


def _not_a_fault(part: str) -> ConfigError:
    return ConfigError(
        f"{part.strip()!r} is no fault: kind=rate with one of {', '.join(KINDS)}, the rate from 0 "
        "to 1, and seconds after a colon for delay and hang, such as delay=0.1:0.005"
    )
