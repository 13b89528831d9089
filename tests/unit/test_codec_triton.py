"""Attention on the codes of ``kivi4`` and ``kivi2`` in Triton: interpreted, and compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.kernels.kivi import KEYS, VALUES, Bits, Kivi, dequantise, quantise
from offload.tiers.codec_kivi import KiviCodec
from offload.tiers.codecs import Unit
from tests.support.triton_cases import SCALE, TOLERANCE, attend, check, every_dtype
from tests.support.triton_tables import draw

# After the module that decides how kernels run.
from offload.kernels.triton_kivi import attend_kivi, supports  # isort: skip

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tensors are on the CPU, where kernels must be interpreted"
)
every_width = pytest.mark.parametrize("num_bits", [4, 2])


def make_chunks(
    num_bits: Bits, *shape: int, key_dim: int, value_dim: int, size: float = 1.0
) -> tuple[tuple[Kivi, Kivi], tuple[Tensor, Tensor]]:
    """Return codes of random chunks, and the rows that they stand for."""
    rows = (
        draw(*shape, key_dim, seed=1) + 2 * draw(key_dim, seed=2),
        draw(*shape, value_dim, seed=3),
    )
    keys, values = quantise(rows[0], num_bits, KEYS), quantise(rows[1] * size, num_bits, VALUES)
    wide = (
        dequantise(keys, num_bits, KEYS, key_dim),
        dequantise(values, num_bits, VALUES, value_dim),
    )
    return (keys, values), wide


@every_width
@every_dtype
@pytest.mark.parametrize(
    ("group", "key_dim", "value_dim"), [(1, 64, 64), (4, 128, 32), (4, 32, 256)]
)
def test_attention_on_codes_is_that_over_what_they_stand_for(
    num_bits: Bits, dtype: torch.dtype, group: int, key_dim: int, value_dim: int
) -> None:
    query = draw(1, 2 * group, 1, key_dim, seed=4, dtype=dtype)
    packed, rows = make_chunks(num_bits, 1, 3, 2, 64, key_dim=key_dim, value_dim=value_dim)
    found = attend_kivi(query, *packed, num_bits=num_bits, value_dim=value_dim, scale=SCALE)
    check(found, attend(query, *rows), dtype)


@every_width
@pytest.mark.parametrize("num_keys", [1, 32, 50, 64])
def test_attention_over_slots_of_a_pool_of_codes_reads_the_named_ones(
    num_bits: Bits, num_keys: int
) -> None:
    slots = torch.tensor([[4, 1], [0, 4]])
    query = draw(2, 4, 3, 64, seed=4)
    packed, rows = make_chunks(num_bits, 1, 5, 2, 32, key_dim=64, value_dim=64)
    found = attend_kivi(
        query,
        *packed,
        num_bits=num_bits,
        value_dim=64,
        scale=SCALE,
        slots=slots,
        num_keys=num_keys,
    )
    hidden = (torch.arange(64) >= num_keys).expand(2, 2, -1)
    keys, values = (own[0][slots] for own in rows)
    check(found, attend(query, keys, values, hidden), torch.float32)


@every_width
def test_attention_on_small_values_keeps_their_digits(num_bits: Bits) -> None:
    query = draw(1, 2, 1, 64, seed=4, dtype=torch.float16)
    packed, rows = make_chunks(num_bits, 1, 1, 2, 64, key_dim=64, value_dim=64, size=1e-2)
    found = attend_kivi(query, *packed, num_bits=num_bits, value_dim=64, scale=SCALE)
    expected = attend(query, *rows)
    error = (found.out - expected.out).norm() / expected.out.norm()
    assert error < TOLERANCE[torch.float16]


@every_width
def test_what_payloads_hold_is_attended(num_bits: Bits) -> None:
    unit, codec = Unit(64, 64, 64, torch.float32), KiviCodec(num_bits)
    rows = draw(2, *unit.shape, seed=1)
    payloads = [np.frombuffer(own, np.uint8) for own in codec.encode(rows, unit)]
    keys, values = (
        Kivi(*(torch.stack(parts)[None, :, None] for parts in zip(*own, strict=True)))
        for own in zip(*(codec.parse(payload, unit)[:2] for payload in payloads), strict=True)
    )
    query = draw(1, 4, 1, 64, seed=4)
    found = attend_kivi(query, keys, values, num_bits=num_bits, value_dim=64, scale=SCALE)
    out = torch.empty_like(rows)
    codec.decode([payload.data for payload in payloads], unit, out)
    expected = attend(query, *out[None, :, None].split(64, -1))
    check(found, expected, torch.float32)


@pytest.mark.parametrize(
    ("group", "key_dim", "tokens", "taken"),
    [(64, 64, 64, True), (65, 64, 64, False), (1, 80, 64, False), (1, 64, 48, False)],
)
def test_attention_on_codes_takes_whole_groups_and_no_other_shapes(
    group: int, key_dim: int, tokens: int, taken: bool
) -> None:
    query = torch.zeros(1, group, 1, key_dim)
    (keys, values), _ = make_chunks(4, 1, 1, 1, tokens, key_dim=key_dim, value_dim=64)
    assert supports(query, keys, values, num_bits=4, value_dim=64) is taken
    if not taken:
        with pytest.raises(ConfigError, match=f"chunks of {tokens} keys"):
            attend_kivi(query, keys, values, num_bits=4, value_dim=64, scale=SCALE)


_COMPILE = """
import json, torch
from tests.support.triton_compile import compile_calls
from offload.kernels.kivi import KEYS, VALUES, quantise
from offload.kernels.triton_kivi import attend_kivi

def call():
    query, rows = torch.zeros(1, 32, 1, 128).bfloat16(), torch.zeros(1, 40, 8, 64, 128)
    for bits in (4, 2):
        packed = quantise(rows, bits, KEYS), quantise(rows, bits, VALUES)
        slots = torch.arange(33).unsqueeze(0)
        attend_kivi(query, *packed, num_bits=bits, value_dim=128, scale=1.0, slots=slots)

print(json.dumps([kernel._asdict() for kernel in compile_calls(call)]))
"""


def test_kernels_compile_for_a_hopper_gpu_and_keep_their_numbers_in_registers(
    tmp_path: Path,
) -> None:
    # In a process of its own: in this one the kernels are interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert process.returncode == 0, process.stderr
    kernels = [own for own in json.loads(process.stdout) if own["name"].startswith("_attend")]
    assert {own["name"] for own in kernels} == {"_attend_kivi4", "_attend_kivi2"}
    assert [own for own in kernels if own["stack_bytes"]] == []
    assert max(own["shared_bytes"] for own in kernels) <= 227 * 1024 // 2
