"""The peak of resident memory, of real allocations."""

import pytest
import torch

from offload.peak_memory import PeakMemory

_BLOCK_BYTES = 64 << 20
_NOISE_BYTES = 16 << 20


def _allocate_and_drop(num_bytes: int) -> None:
    torch.ones(num_bytes, dtype=torch.uint8)


def test_peak_of_a_block_that_frees_its_memory_counts_it() -> None:
    with PeakMemory() as memory:
        _allocate_and_drop(_BLOCK_BYTES)
    assert memory.growth_bytes == pytest.approx(_BLOCK_BYTES, abs=_NOISE_BYTES)


def test_peak_before_the_block_is_not_counted() -> None:
    _allocate_and_drop(_BLOCK_BYTES)
    with PeakMemory() as memory:
        _allocate_and_drop(1024)
    assert memory.growth_bytes < _NOISE_BYTES
