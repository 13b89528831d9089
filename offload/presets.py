"""Presets: each published system as a choice of parts. A preset never has its own runtime."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from offload.errors import ConfigError
from offload.index.clusters import ClusterIndex
from offload.index.residual import ResidualIndex
from offload.sparse_plan import SparsePlan
from offload.tiers.eviction import EvictionPolicy, KeepFirst


@dataclass(frozen=True, slots=True)
class Preset:
    """A named composition.

    Attributes
    ----------
    name : str
    eviction : callable
        Makes the eviction policy of one tier.
    sparse : SparsePlan or None
        What decoding reads; None: everything.
    """

    name: str
    eviction: Callable[[], EvictionPolicy]
    sparse: SparsePlan | None = None


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("exact", KeepFirst),
        Preset("adaptive", KeepFirst, SparsePlan(ResidualIndex.build)),
        Preset("retroinfer", KeepFirst, SparsePlan(ClusterIndex.build, budget=0.018)),
    )
}


def find_preset(name: object) -> Preset:
    """Return a preset by name, or raise ConfigError naming those that exist."""
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(PRESETS)}")
    return preset


def with_budget(preset: Preset, budget: object) -> Preset:
    """Return a preset that reads so much; None: as much as it does by itself.

    Parameters
    ----------
    preset : Preset
    budget : float, int or None
        A share of the context, above 0 and at most 1.0; or a positive number of tokens.

    Raises
    ------
    ConfigError
        The preset reads everything, or the budget is none.
    """
    if budget is None:
        return preset
    if preset.sparse is None:
        raise ConfigError(f"policy {preset.name!r} reads everything; it takes no budget")
    if (
        isinstance(budget, bool)
        or not isinstance(budget, int | float)
        or budget <= 0
        or (isinstance(budget, float) and budget > 1)
    ):
        raise ConfigError(
            f"budget={budget!r} is neither a share of the context, above 0 and at most 1.0, nor a "
            "positive number of tokens"
        )
    return replace(preset, sparse=replace(preset.sparse, budget=budget))
