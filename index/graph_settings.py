"""What is chosen when a graph over keys is built and searched."""

from dataclasses import asdict, dataclass

from offload.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GraphSettings:
    """How a graph is built and searched.

    Attributes
    ----------
    beam : int
        Keys that a search remembers, or the budget if that is more.
    keys_per_place : int
        It remembers one of so many keys at least, so that long segments get a longer beam.
    width : int
        Keys whose edges it follows at a time.
    degree : int
        Edges from a key, at most.
    num_nearest : int
        Keys that each query of the prefill is taken to find.
    pivots : int
        How many of them, the nearest first, are linked to the others; 1 as published.
    num_entries : int
        Keys where a search begins.
    max_queries : int
        Queries of the prefill that are looked at, spread evenly.
    segment_tokens : int
        Keys in one graph; a longer run is cut.
    """

    beam: int = 256
    keys_per_place: int = 150
    width: int = 8
    degree: int = 16
    num_nearest: int = 64
    pivots: int = 64
    num_entries: int = 8
    max_queries: int = 16384
    segment_tokens: int = 131072

    def beam_for(self, num_keys: int, budget: int) -> int:
        """Return how many keys a search of so many remembers."""
        return max(self.beam, budget, num_keys // self.keys_per_place)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"{name}={value}; it is at least one")
