"""How the stages of the pipeline do, for people and programs to read."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StageStats:
    """One stage: what the model expected of it, and what it took.

    Attributes
    ----------
    num_samples : int
    estimated_s, measured_s : float
        Moving averages over the same work; 0 before the first.
    """

    num_samples: int
    estimated_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Measured over estimated, less one; 0 if there is nothing to compare."""
        return self.measured_s / self.estimated_s - 1 if self.estimated_s else 0.0


@dataclass(frozen=True, slots=True)
class PipelineStats:
    """A moment of a ``StageClock``.

    Attributes
    ----------
    disk_bytes_per_s, read_s, bus_bytes_per_s : float
        As in ``Links``.
    decode_bytes_per_s : dict of str to float
        By codec.
    compute_s : float
        Of one layer.
    stages : dict of str to StageStats
        ``disk``, ``bus``, ``decode``, ``compute``, and ``layer``: the pace of the whole.
    """

    disk_bytes_per_s: float
    read_s: float
    bus_bytes_per_s: float
    decode_bytes_per_s: dict[str, float]
    compute_s: float
    stages: dict[str, StageStats]

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts of plain numbers; bandwidths that are infinite become None."""
        plain = asdict(self)
        for name in ("disk_bytes_per_s", "bus_bytes_per_s"):
            plain[name] = _finite(plain[name])
        rates = self.decode_bytes_per_s.items()
        plain["decode_bytes_per_s"] = {name: _finite(rate) for name, rate in rates}
        return plain


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
