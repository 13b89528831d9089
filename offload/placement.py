"""Names of placements: how chunks are ranked that may change places between memory and disk."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from offload.errors import ConfigError
from offload.tiers.eviction import LeastRecentlyUsed, Ranking
from offload.tiers.eviction_cumulative import LeastCumulativeMass
from offload.tiers.eviction_layers import ByLayer
from offload.tiers.eviction_mass import LeastMass
from offload.tiers.eviction_recurrence import LongestOverdue
from offload.types import ChunkId

FIRST = "first"
"""Chunks stay where they were put: in the fastest tier that had room."""

LayerOf = Callable[[ChunkId], int]

_RANKINGS: Mapping[str, Callable[[LayerOf], Ranking]] = MappingProxyType(
    {
        "recent": lambda layer_of: LeastRecentlyUsed(),
        "mass": lambda layer_of: LeastMass(),
        "cumulative": lambda layer_of: LeastCumulativeMass(),
        "recurrence": lambda layer_of: LongestOverdue(),
        "layers": lambda layer_of: ByLayer(LeastMass, layer_of),
    }
)

PLACEMENTS = (FIRST, *_RANKINGS)


def check_placement(name: object) -> str:
    """Return the name of a placement, or raise ConfigError naming those that exist."""
    if isinstance(name, str) and name in PLACEMENTS:
        return name
    raise ConfigError(f"unknown placement {name!r}; known: {', '.join(PLACEMENTS)}")


def make_ranking(name: str, layer_of: LayerOf) -> Ranking:
    """Return what ranks the chunks of one memory tier.

    Parameters
    ----------
    name : str
        Any placement but ``FIRST``.
    layer_of : callable
        Names the layer of a chunk.
    """
    return _RANKINGS[name](layer_of)
