"""The peak of resident memory, of real allocations.

In a process of its own: in that of the tests, memory of earlier ones may go back at any moment.
"""

import subprocess
import sys

import pytest

_BLOCK_BYTES = 64 << 20
_NOISE_BYTES = 16 << 20
_SCRIPT = f"""
from offload.peak_memory import PeakMemory

def allocate_and_drop(num_bytes):
    len(bytes([1]) * num_bytes)

with PeakMemory() as memory:
    allocate_and_drop({_BLOCK_BYTES})
print(memory.growth_bytes)
with PeakMemory() as memory:
    allocate_and_drop(1024)
print(memory.growth_bytes)
"""


def test_peak_of_a_block_counts_what_it_freed_and_nothing_earlier() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True
    )
    first, second = map(int, run.stdout.split())
    assert first == pytest.approx(_BLOCK_BYTES, abs=_NOISE_BYTES)
    assert second < _NOISE_BYTES
