"""Who takes part: what users do today, and our caches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import Cache, DynamicCache

from offload import OffloadedCache
from offload.bench.dense import DenseCache
from offload.bench.placement import near_storage, place, streaming
from offload.bench.settings import BenchSettings, Cell
from offload.errors import ConfigError
from offload.evals.contenders import find_contender
from offload.presets import PRESETS, Preset, customised, find_preset

DENSE: Final = "dense"
STOCK: Final = {
    DENSE: "torch's attention over all keys in memory, in its fastest form, without any cache",
    "dynamic": "transformers' DynamicCache",
    "offloading": "DynamicCache(offloading=True): layers in host memory, the next one prefetched",
    "flexgen": "every chunk is read from disk at every step, while the one before is attended to",
}
"""Besides the policies."""

NEEDS_PREFILL: Final = "retrieval_attention"
"""Learns from the queries of the prompt, and an injected context has none."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A contender as it takes part.

    Attributes
    ----------
    name : str
        As the user wrote it.
    policy : Preset or None
        None for what is not ours.
    codec : str
        How the disk stores keys and values.
    """

    name: str
    policy: Preset | None
    codec: str = "raw"

    @property
    def is_dense(self) -> bool:
        """Whether every key is read at every step."""
        if self.policy is None:
            return True
        near = self.policy.near
        return self.policy.sparse is None and (near is None or near.mode == "dense")

    @property
    def has_index(self) -> bool:
        """Whether an index is searched."""
        return self.policy is not None and not (
            self.policy.sparse is None or self.policy.sparse.index is None
        )

    @property
    def is_on_disk(self) -> bool:
        """Whether nothing of it is kept in memory, but for a share that the cell gives."""
        return self.name == "flexgen" or self.is_near

    @property
    def is_near(self) -> bool:
        """Whether storage-side workers hold it."""
        return self.policy is not None and self.policy.near is not None

    def uses_disk(self, settings: BenchSettings, cell: Cell) -> bool:
        """Whether it keeps anything on disk."""
        if self.policy is None:
            return False
        if self.is_on_disk:
            return True
        return place(settings, cell, has_device=_has_device(settings)).has_disk

    def host_share(self, settings: BenchSettings, cell: Cell) -> float:
        """Return how much host memory it needs, as a share of the bytes of keys and values."""
        if self.uses_disk(settings, cell):
            return cell.ram_share or 0.0
        if _has_device(settings) and self.policy is None and self.name != "offloading":
            return 0.0
        return 1.0

    def open(self, settings: BenchSettings, cell: Cell, config: Any) -> Cache | DenseCache:
        """Return an empty cache; ``config`` is that of the model."""
        if self.name == DENSE:
            return _dense(settings, cell)
        if self.policy is None:
            return DynamicCache(config=config, offloading=self.name == "offloading")
        if self.is_near:
            placement = near_storage(settings, cell)
        elif self.is_on_disk:
            placement = streaming(settings, cell)
        else:
            placement = place(settings, cell, has_device=_has_device(settings))
        return OffloadedCache(
            placement.tiers,
            policy=self.policy,
            capacity=placement.capacity,
            codec=self.codec if placement.has_disk else "raw",
            disk_path=settings.disk_path if placement.has_disk else None,
            config=config,
        )


def find_entries(settings: BenchSettings) -> list[Entry]:
    """Return the contenders of a benchmark.

    Raises
    ------
    ConfigError
        There is no such contender, or it cannot take part in this benchmark on this machine.
    """
    return [_find(name, settings) for name in settings.contenders]


def expand(policies: Sequence[str], budgets: Sequence[str]) -> tuple[str, ...]:
    """Give every sparse policy that comes without a budget each of these, if there are any."""
    names: list[str] = []
    for policy in policies:
        preset = PRESETS.get(policy)
        if budgets and preset is not None and preset.sparse is not None:
            names += [f"{policy}:{budget}" for budget in budgets]
        else:
            names.append(policy)
    return tuple(names)


def _find(name: str, settings: BenchSettings) -> Entry:
    if name == "flexgen":
        return Entry(name, find_preset("exact"))
    if name in STOCK:
        if name == "offloading" and not _has_device(settings):
            raise ConfigError("contender 'offloading' needs a CUDA device to offload from")
        if name == DENSE and settings.level == "decode":
            raise ConfigError("contender 'dense' is no cache: it is for 'attention' only")
        return Entry(name, None)
    policy = name.partition(":")[0]
    if policy not in PRESETS:
        known = ", ".join((*STOCK, *PRESETS))
        raise ConfigError(f"unknown contender {policy!r}; known: {known}")
    if policy == NEEDS_PREFILL and not settings.has_prefill:
        raise ConfigError(
            f"contender {name!r} learns from a prompt's queries; use 'decode' with --prefill"
        )
    found = find_contender(name, "B")
    preset = found.preset
    if preset.sparse is not None:
        # A few layers stand for many, of which nearly all are sparse.
        preset = customised(preset, dense_layers=0)
    return Entry(name, preset, found.codec)


def _has_device(settings: BenchSettings) -> bool:
    return settings.torch_device.type == "cuda"


def _dense(settings: BenchSettings, cell: Cell) -> DenseCache:
    shape, total = settings.shape, cell.num_tokens + settings.num_steps
    return DenseCache(
        settings.num_layers,
        cell.batch,
        shape.num_kv_heads,
        total,
        shape.head_dim,
        settings.torch_dtype,
        torch.device(settings.torch_device),
    )
