"""Rows in 8 and 4 bits: how far off they are, and where their bits lie."""

import pytest
import torch

from offload.errors import ConfigError
from offload.kernels.quantised import GROUP_CHANNELS, Bits, Quantised, dequantise, quantise

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
"""Of a scale, at most; a number beyond the largest is cut by as much."""


@pytest.mark.parametrize("scale_dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("num_bits", "largest"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("dim", [2, 64, 80, 128])
def test_element_is_off_by_half_a_scale_and_the_rounding_of_the_scale(
    num_bits: Bits, largest: int, dim: int, scale_dtype: torch.dtype
) -> None:
    rows = torch.randn(3, 50, dim, generator=torch.Generator().manual_seed(dim))
    packed = quantise(rows, num_bits, scale_dtype)
    channels = dim if num_bits == 8 else GROUP_CHANNELS
    scales = packed.scales.float().repeat_interleave(channels, -1)[..., :dim]
    limit = scales * (0.5 + largest * ROUNDING[scale_dtype])
    assert packed.num_bits == num_bits
    assert packed.dim == dim
    assert ((dequantise(packed) - rows).abs() <= limit).all()


@pytest.mark.parametrize("num_bits", [8, 4])
def test_rows_of_zeros_come_back_as_zeros(num_bits: Bits) -> None:
    rows = torch.zeros(2, 64)
    assert torch.equal(dequantise(quantise(rows, num_bits)), rows)


@pytest.mark.parametrize("num_bits", [8, 4])
def test_quantising_what_was_quantised_changes_nothing(num_bits: Bits) -> None:
    rows = dequantise(quantise(torch.randn(20, 64), num_bits, torch.float16))
    again = dequantise(quantise(rows, num_bits, torch.float16))
    torch.testing.assert_close(again, rows, rtol=2e-3, atol=0)


def test_byte_of_four_bits_holds_a_channel_of_each_half() -> None:
    numbers = torch.tensor([[0x8F, 0x18]], dtype=torch.uint8)
    scales = torch.tensor([[0.5]], dtype=torch.bfloat16)
    rows = dequantise(Quantised(numbers, scales))
    assert rows.tolist() == [[3.5, 0.0, 0.0, -3.5]]


def test_odd_number_of_channels_in_four_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="rows of 33 channels"):
        quantise(torch.zeros(1, 33), 4)
