"""What the hardware could do: the time that moving the bytes of a step takes at least. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Bytes per second, as measured beside the contenders.

    Attributes
    ----------
    memory : float
        Reading the memory in which dense attention has its keys: the device's.
    disk : float or None
        Reading the disk; None if no contender uses it.
    bus : float or None
        Copying page-locked memory to the device; None without a CUDA device.
    """

    memory: float
    disk: float | None = None
    bus: float | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that one step had to move; None where nobody counts them.

    Attributes
    ----------
    scanned : float or None
        Of indexes, in the device's memory.
    read : float or None
        Keys and values that were attended to.
    weights : float
        Of the model.
    host : float or None
        From host memory to a CUDA device.
    disk : float or None
    """

    scanned: float | None
    read: float | None
    weights: float = 0.0
    host: float | None = None
    disk: float | None = None


def least_seconds(moved: Moved, speeds: Bandwidths) -> float | None:
    """Return the time that a step takes at least, if all ways are used at the same time.

    None if it is not known what had to move.
    """
    if moved.scanned is None or moved.read is None:
        return None
    times = [(moved.scanned + moved.read + moved.weights) / speeds.memory]
    if moved.host and speeds.bus:
        times.append(moved.host / speeds.bus)
    if moved.disk and speeds.disk:
        times.append(moved.disk / speeds.disk)
    return max(times)


def typical(speeds: Sequence[Bandwidths]) -> Bandwidths:
    """Return the medians of several measurements."""
    return Bandwidths(
        statistics.median(each.memory for each in speeds),
        _median([each.disk for each in speeds]),
        _median([each.bus for each in speeds]),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
