"""Caches so small that nearly all of their chunks are with storage-side workers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Cache, LogitsProcessor, LogitsProcessorList

from offload import OffloadedCache
from offload.presets import Preset, customised
from offload.tiers.near.disk import NearDisk
from tests.support.small_caches import CAPACITY, make_cache, make_llama

TIERS = ("gpu", "disk")
SMALL = {tier: CAPACITY[tier] for tier in TIERS}
DENSE = customised("instinfer", mode="dense")


def open_small(tmp_path: Path, policy: str | Preset = DENSE, **changes: Any) -> OffloadedCache:
    """Make a cache for ``make_llama`` whose chunks are nearly all with two workers."""
    arguments = {
        "tiers": TIERS,
        "capacity": SMALL,
        "policy": policy,
        "disk_path": [tmp_path / "a", tmp_path / "b"],
    }
    return make_cache(tmp_path, **{**arguments, **changes})


def near(cache: OffloadedCache) -> NearDisk:
    runtime = cache._core.runtime
    assert runtime is not None
    assert runtime.engine.near is not None
    return runtime.engine.near


class AtStep(LogitsProcessor):
    """Does something once, after so many steps of ``generate``."""

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        self._left = number
        self._act = act

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        self._left -= 1
        if not self._left:
            self._act()
        return scores


def generate(cache: Cache, ids: Tensor, num_new: int, *steps: AtStep) -> Tensor:
    tokens: Tensor = make_llama().generate(
        ids,
        past_key_values=cache,
        max_new_tokens=num_new,
        do_sample=False,
        logits_processor=LogitsProcessorList(steps),
    )
    return tokens
