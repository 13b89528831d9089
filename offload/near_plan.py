"""What a preset says about attention next to the disk."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from offload.errors import ConfigError
from offload.tiers.near.settings import NearSettings
from offload.tiers.near.sparf_settings import SparF

_SETTINGS = ("workers_per_path", "block_tokens", "memory_bytes", "cpus_per_worker", "num_threads")


@dataclass(frozen=True, slots=True)
class NearPlan:
    """What a preset says about attention next to the disk.

    Attributes
    ----------
    mode : {"sparf", "dense"}
        Read what a few channels of the query point at, or everything.
    budget : float or int
        Tokens attended exactly, of those on the disk: a share, or a number.
    channel_share : float
        Of the key's channels, to find these tokens by.
    group_tokens : int
        Tokens chosen and read together.
    max_queries : int
        A call with more queries of a row is a prefill, and its past is fetched.
    settings : NearSettings
    """

    mode: Literal["sparf", "dense"] = "sparf"
    budget: float | int = 1 / 16
    channel_share: float = 1 / 8
    group_tokens: int = 16
    max_queries: int = 4
    settings: NearSettings = field(default_factory=NearSettings)

    def how(self, key_dim: int) -> SparF | None:
        """Return how much is read of keys of so many channels; None is all."""
        if self.mode == "dense":
            return None
        channels = max(1, round(self.channel_share * key_dim))
        return SparF(channels, self.budget, self.group_tokens)


def changed(plan: NearPlan, options: dict[str, Any]) -> NearPlan:
    """Return a plan with some of its choices changed.

    Parameters
    ----------
    plan : NearPlan
    options : dict
        Attributes of the plan or of its settings.

    Raises
    ------
    ConfigError
        An option is unknown, or its value is none.
    """
    own = {name: value for name, value in options.items() if name not in _SETTINGS}
    known = ("mode", "budget", "channel_share", "group_tokens", "max_queries")
    unknown = [name for name in own if name not in known]
    if unknown:
        raise ConfigError(
            f"attention next to the disk takes no {' or '.join(unknown)}; it takes "
            f"{', '.join((*known, *_SETTINGS))}"
        )
    if own.get("mode", "dense") not in ("sparf", "dense"):
        raise ConfigError(f"mode={own['mode']!r} is neither 'sparf' nor 'dense'")
    share = own.get("channel_share", 1.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ConfigError(f"channel_share={share!r} is no share, above 0 and at most 1.0")
    for name in ("group_tokens", "max_queries"):
        number = own.get(name, 1)
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{name}={number!r} is no positive number")
    settings = {name: value for name, value in options.items() if name in _SETTINGS}
    return replace(plan, **own, settings=replace(plan.settings, **settings))
