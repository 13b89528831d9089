"""Sessions of a tiny model under LeoAM's policy, whose indexes are built in no time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload import OffloadedCache, SessionStore
from offload.presets import Preset, customised
from offload.runtime import Runtime
from offload.sparse.segments import SegmentSizes
from tests.support.generation import decode, prompt
from tests.support.models import make_model
from tests.support.sessions import small_store

TIERS = ("gpu", "cpu", "disk")
SIZE = 16
SLOT_BYTES = 4096
NUM_TOKENS = 661
"""41 chunks, of which 36 lie between sinks and window: four segments of 128 tokens, no fifth."""

NUM_SEGMENTS = 4
MORE_TOKENS = 300
"""Enough for two segments: one of chunks that were there already, one of new ones."""

BUDGET = 0.05

CAPACITY: dict[str, int | str] = {"gpu": 24 * SLOT_BYTES, "cpu": 96 * SLOT_BYTES, "disk": "64MiB"}
"""A part of every layer is in no memory, whether it was read or loaded."""


def leoam(**changes: Any) -> Preset:
    return customised("leoam", **{"budget": BUDGET, "early_budget": 0.1, **changes})


def in_short_segments(policy: str) -> Preset:
    preset = customised(policy, budget=BUDGET, dense_layers=0)
    assert preset.sparse is not None
    return replace(preset, sparse=replace(preset.sparse, sizes=SegmentSizes((128,))))


def open_cache(scratch: Path, policy: Preset | str | None = None) -> OffloadedCache:
    policy = leoam() if policy is None else policy
    return OffloadedCache(
        TIERS, policy=policy, capacity=CAPACITY, disk_path=scratch, chunk_tokens=SIZE
    )


def load(
    store: SessionStore, scratch: Path, policy: Preset | str | None = None, name: str = "chat"
) -> OffloadedCache:
    policy = leoam() if policy is None else policy
    model = make_model("llama")
    return OffloadedCache.load(
        name, model, store=store, policy=policy, capacity=CAPACITY, disk_path=scratch
    )


@torch.no_grad()
def read(
    cache: OffloadedCache, batch: int = 1, num_tokens: int = NUM_TOKENS, seed: int = 1
) -> None:
    """Read a piece of a prompt exactly, and one token that is searched for."""
    model = make_model("llama")
    model(prompt(batch, num_tokens - 1, seed), past_key_values=cache)
    model(prompt(batch, 1, seed + 50), past_key_values=cache)


def go_on(cache: OffloadedCache, batch: int = 1) -> Tensor:
    """Return the logits of some steps of decoding."""
    return torch.cat([*decode(make_model("llama"), cache, prompt(batch, 1, seed=4), 5).logits])


def check_alike(found: Tensor, expected: Tensor) -> None:
    """Tokens are the same; sums of what lies in memory and of what does not differ in rounding."""
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def runtime_of(cache: OffloadedCache) -> Runtime:
    runtime = cache._core.runtime
    assert runtime is not None
    return runtime


def save(cache: OffloadedCache, store: SessionStore, name: str = "chat") -> None:
    cache.save(name, store=store, model=make_model("llama"))


def make_root(folder: Path) -> Path:
    """Return a root with session ``chat``, and ``bare``, the same without indexes."""
    with small_store(folder / "root") as store:
        with open_cache(folder) as cache:
            read(cache)
            save(cache, store)
        with load(store, folder, "exact") as cache:
            save(cache, store, "bare")
    return folder / "root"
