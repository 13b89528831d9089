"""A pytest plugin that runs transformers' own tests with OffloadedCache in place of DynamicCache.

``generate`` and the models make their caches themselves, so the class is replaced where it is
defined. Used by ``tools/run_transformers_tests.py``; knows nothing of which tests run.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import Cache, DynamicCache, cache_utils

from offload import OffloadedCache

_TIERS = ("gpu", "cpu", "disk")
_CAPACITY = {"gpu": "192KiB", "cpu": "24KiB", "disk": "1GiB"}
"""So small that the texts of a dozen tokens in these tests fill more than the device."""
_CHUNK_TOKENS = 2

_alive: list[OffloadedCache] = []
_totals: Counter[str] = Counter()


class _Layers(DynamicCache):
    """Gives DynamicCache the constructor of Cache, which is what OffloadedCache calls."""

    def __init__(self, layers: list[Any]) -> None:
        Cache.__init__(self, layers=layers)


class RoutedCache(OffloadedCache, _Layers):
    """An OffloadedCache that is made like, and passes for, a DynamicCache."""

    def __init__(
        self,
        ddp_cache_data: Iterable[tuple[Tensor | None, ...]] | None = None,
        config: Any = None,
        **_offloading: bool,
    ) -> None:
        super().__init__(_TIERS, capacity=_CAPACITY, chunk_tokens=_CHUNK_TOKENS, config=config)
        for index, (keys, values, *_) in enumerate(ddp_cache_data or ()):
            if keys is not None and values is not None:
                self.update(keys, values, index)
        _alive.append(self)
        _totals["caches"] += 1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        _totals["updates"] += 1
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


RoutedCache.__name__ = RoutedCache.__qualname__ = DynamicCache.__name__


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--routed-report", type=Path, help="where to write what the caches did")


def pytest_configure() -> None:
    """Replace the class wherever it has been imported to, and where it will be imported from."""
    original = cache_utils.DynamicCache
    loaded = [module for name, module in sys.modules.items() if name.startswith("transformers")]
    for module in loaded:
        if vars(module).get("DynamicCache") is original:
            module.DynamicCache = RoutedCache  # type: ignore[attr-defined]


def pytest_runtest_teardown() -> None:
    for cache in _alive:
        for name, tier in cache.stats().tiers.items():
            _totals[f"{name}_stored_bytes"] += tier.stored_bytes
        cache.close()
    _alive.clear()


def pytest_unconfigure(config: pytest.Config) -> None:
    report: Path | None = config.getoption("--routed-report")
    if report is not None:
        report.write_text(json.dumps(_totals))
