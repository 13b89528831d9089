"""Triton kernels under their interpreter: attention, gathers and bounds."""

import pytest
import torch

from benchmarks.gpu_kernels import make_cases
from tests.support.triton_cases import AttentionCases, RowCases

# After the module that decides how kernels run.
from offload.kernels import triton_chunks, triton_rows  # isort: skip
from offload.kernels.triton_launch import plan_splits  # isort: skip

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here; tests/gpu runs these tests"
)


class TestInterpretedAttention(AttentionCases):
    device = "cpu"


class TestInterpretedRows(RowCases):
    device = "cpu"


def test_every_case_of_the_benchmark_runs_in_a_small_size() -> None:
    names = []
    for case in make_cases("cpu", 256):
        case.run()
        assert case.num_bytes > 0
        names.append(case.name)
    assert len(set(names)) == len(names) == 18


@pytest.mark.parametrize(
    ("group", "dim", "dtype", "taken"),
    [
        (8, 128, torch.bfloat16, True),
        (64, 80, torch.float32, True),
        (65, 80, torch.float32, False),
        (1, 256, torch.float16, True),
        (1, 272, torch.float16, False),
        (1, 64, torch.float64, False),
    ],
)
def test_attention_takes_what_fits_into_registers_and_no_more(
    group: int, dim: int, dtype: torch.dtype, taken: bool
) -> None:
    query, keys = torch.zeros(1, group, 1, dim).to(dtype), torch.zeros(1, 2, 1, 8, dim).to(dtype)
    addresses = torch.zeros(1, 1, 5, dtype=torch.int64)
    assert triton_chunks.supports(query, keys, keys) is taken
    assert triton_rows.supports(query, addresses, dim) is taken


def test_attention_over_rows_that_begin_between_units_is_not_taken() -> None:
    query, addresses = torch.zeros(1, 1, 1, 66), torch.zeros(1, 1, 5, dtype=torch.int64)
    assert not triton_rows.supports(query, addresses, 64)


@pytest.mark.parametrize("num_programs", [1, 3, 500])
@pytest.mark.parametrize("num_keys", [1, 63, 64, 65, 5000])
@pytest.mark.parametrize("row_bytes", [64, 512, 768, 4096])
def test_splits_cover_every_key_once_and_none_is_empty(
    num_programs: int, num_keys: int, row_bytes: int
) -> None:
    splits = plan_splits(torch.device("cpu"), num_programs, num_keys, row_bytes)
    assert splits.split_keys % splits.block == 0
    assert (splits.num_splits - 1) * splits.split_keys < num_keys
    assert splits.num_splits * splits.split_keys >= num_keys
