"""The scan in Triton under its interpreter."""

import pytest
import torch

from tests.support.triton_scan_cases import ScanCases

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here; tests/gpu runs these tests"
)


class TestInterpretedScan(ScanCases):
    device = "cpu"
