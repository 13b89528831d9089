"""Presets: each published system as a choice of parts. A preset never has its own runtime."""

from collections.abc import Callable
from dataclasses import dataclass

from offload.errors import ConfigError
from offload.tiers.eviction import EvictionPolicy, KeepFirst


@dataclass(frozen=True, slots=True)
class Preset:
    """A named composition.

    Attributes
    ----------
    name : str
    eviction : callable
        Makes the eviction policy of one tier.
    """

    name: str
    eviction: Callable[[], EvictionPolicy]


PRESETS = {preset.name: preset for preset in (Preset("exact", KeepFirst),)}


def find_preset(name: object) -> Preset:
    """Return a preset by name, or raise ConfigError naming those that exist."""
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(PRESETS)}")
    return preset
