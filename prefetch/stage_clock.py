"""What the stages of the pipeline really take, as moving averages. Reads no clock itself."""

import math
import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from offload.errors import ConfigError
from offload.prefetch.pipeline import CodecCost, Links
from offload.prefetch.pipeline_stats import PipelineStats, StageStats

_ALPHA: Final = 0.2
"""Weight of the latest measurement: after ten, a tenth is left of what was believed before."""

_STALL: Final = 4.0
"""A measurement counts as at most so many times what was expected: a stall passes, and a disk that
stays slow is believed after a few more reads."""

_SPREAD: Final = 0.01
"""Variance of the share of a read's time that is per request, below which requests and bytes cannot
be told apart and are taken to have slowed down alike."""

_LEAST: Final = 1e-6
"""No cost falls below this part of what it was at start."""


class StageClock:
    """Follows the costs that the pipeline is planned by, and how far its estimates are off.

    Whoever runs a stage says how much work it was and how long it took. Costs are seconds per unit
    of work, averaged with weight 0.2 for the latest. The cost of a read and that of its bytes are
    told apart by how the time varies with the size of reads, relative to the costs at start.

    Any thread may call any method; each takes a lock for some microseconds, and what is returned
    does not change any more.

    Parameters
    ----------
    links : Links
        Speeds at start. A disk's cost that is nothing then stays nothing.
    codecs : iterable of CodecCost
        What there is to decode, with the speeds at start.
    """

    def __init__(self, links: Links, codecs: Iterable[CodecCost] = ()) -> None:
        self._lock = threading.Lock()
        self._start = links
        self._disk = _TwoFactors()
        self._bus_s = 1 / links.bus_bytes_per_s
        self._codecs = {codec.name: codec for codec in codecs}
        self._decode_s = {name: 1 / c.decode_bytes_per_s for name, c in self._codecs.items()}
        self._compute_s = 0.0
        names = ("disk", "bus", "decode", "compute", "layer")
        self._stages = dict.fromkeys(names, StageStats(0, 0.0, 0.0))

    def observe_disk(self, num_bytes: int, num_reads: int, seconds: float) -> None:
        """Take note of reads from the disk.

        Parameters
        ----------
        num_bytes : int
            As stored.
        num_reads : int
        seconds : float
            From the first request to the last byte, with nothing else on the disk.

        Raises
        ------
        ConfigError
            A number is negative or not finite; of every ``observe`` method.
        """
        _check("disk", num_bytes + num_reads, seconds)
        with self._lock:
            reads_s = num_reads * self._start.read_s
            bytes_s = num_bytes / self._start.disk_bytes_per_s
            expected_s = self._disk.seconds(reads_s, bytes_s)
            self._note("disk", expected_s, seconds)
            if expected_s > 0:
                self._disk.observe(reads_s, bytes_s, min(seconds, _STALL * expected_s))

    def observe_bus(self, num_bytes: int, seconds: float) -> None:
        """Take note of bytes that went from host to device."""
        _check("bus", num_bytes, seconds)
        with self._lock:
            self._note("bus", num_bytes * self._bus_s, seconds)
            self._bus_s = _mean(self._bus_s, num_bytes, seconds)

    def observe_decode(self, codec: str, num_bytes: int, seconds: float) -> None:
        """Take note of decoded bytes.

        Raises
        ------
        ConfigError
            There is no such codec, or see ``observe_disk``.
        """
        _check("decode", num_bytes, seconds)
        if codec not in self._codecs:
            known = ", ".join(sorted(self._codecs))
            raise ConfigError(f"there is no codec {codec!r}, only {known or 'none'}")
        with self._lock:
            self._note("decode", num_bytes * self._decode_s[codec], seconds)
            self._decode_s[codec] = _mean(self._decode_s[codec], num_bytes, seconds)

    def observe_compute(self, seconds: float) -> None:
        """Take note of the computation of one layer; the first one is believed at once."""
        _check("compute", 1, seconds)
        with self._lock:
            self._note("compute", self._compute_s or seconds, seconds)
            self._compute_s = _mean(self._compute_s, 1, seconds)

    def observe_layer(self, estimated_s: float, measured_s: float) -> None:
        """Take note of the pace of the whole pipeline beside what its plan said."""
        _check("layer", estimated_s, measured_s)
        with self._lock:
            self._note("layer", estimated_s, measured_s)

    @property
    def compute_s(self) -> float:
        """Seconds of one layer."""
        with self._lock:
            return self._compute_s

    def links(self) -> Links:
        """Return the links as they are now."""
        with self._lock:
            return self._links()

    def codecs(self) -> list[CodecCost]:
        """Return the codecs with their speeds now, in the order given."""
        with self._lock:
            return [
                replace(codec, decode_bytes_per_s=_per_second(self._decode_s[name]))
                for name, codec in self._codecs.items()
            ]

    def stats(self) -> PipelineStats:
        """Return all of it, of one moment."""
        with self._lock:
            links = self._links()
            return PipelineStats(
                links.disk_bytes_per_s,
                links.read_s,
                links.bus_bytes_per_s,
                {name: _per_second(unit_s) for name, unit_s in self._decode_s.items()},
                self._compute_s,
                dict(self._stages),
            )

    def _links(self) -> Links:
        of_reads, of_bytes = self._disk.factors
        return Links(
            self._start.disk_bytes_per_s / of_bytes,
            self._start.read_s * of_reads,
            _per_second(self._bus_s),
            self._start.is_shared,
        )

    def _note(self, stage: str, estimated_s: float, measured_s: float) -> None:
        old = self._stages[stage]
        weight = _ALPHA if old.num_samples else 1.0
        self._stages[stage] = StageStats(
            old.num_samples + 1,
            old.estimated_s + weight * (estimated_s - old.estimated_s),
            old.measured_s + weight * (measured_s - old.measured_s),
        )


class _TwoFactors:
    """How many times slower than at start requests and bytes are: a line through ratios.

    With s the share of the expected time that is per request, measured over expected time is
    ``of_bytes + s * (of_reads − of_bytes)``, so the two factors are a regression over s.
    """

    def __init__(self) -> None:
        self.factors = (1.0, 1.0)
        self._share = self._ratio = 0.0
        self._variance = self._covariance = 0.0
        self._is_new = True

    def seconds(self, reads_s: float, bytes_s: float) -> float:
        return self.factors[0] * reads_s + self.factors[1] * bytes_s

    def observe(self, reads_s: float, bytes_s: float, seconds: float) -> None:
        share, ratio = reads_s / (reads_s + bytes_s), seconds / (reads_s + bytes_s)
        if self._is_new:
            # What was measured at start counts as one measurement before the first.
            self._share, self._ratio, self._is_new = share, 1.0, False
        by_share, by_ratio = share - self._share, ratio - self._ratio
        self._share += _ALPHA * by_share
        self._ratio += _ALPHA * by_ratio
        self._variance = (1 - _ALPHA) * (self._variance + _ALPHA * by_share**2)
        self._covariance = (1 - _ALPHA) * (self._covariance + _ALPHA * by_share * by_ratio)
        slope = self._covariance / (self._variance + _SPREAD)
        of_bytes = self._ratio - slope * self._share
        self.factors = (max(of_bytes + slope, _LEAST), max(of_bytes, _LEAST))


def _mean(unit_s: float, amount: float, seconds: float) -> float:
    if amount == 0:
        return unit_s
    found = seconds / amount
    return unit_s + _ALPHA * (min(found, _STALL * unit_s) - unit_s) if unit_s > 0 else found


def _per_second(unit_s: float) -> float:
    return 1 / unit_s if unit_s > 0 else math.inf


def _check(stage: str, amount: float, seconds: float) -> None:
    if not (0 <= amount < math.inf and 0 <= seconds < math.inf):
        raise ConfigError(f"{stage}: {amount} of work in {seconds} s cannot have been measured")
