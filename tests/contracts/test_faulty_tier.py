"""A faulty tier keeps the contract of a tier as long as no fault strikes, or none but delays."""

from pathlib import Path

import pytest
import torch

from offload.tiers.faults import FaultPlan
from offload.tiers.faulty import FaultyTier
from offload.tiers.memory import MemoryTier
from offload.types import ChunkLayout
from tests.contracts.tier_contract import TierContract
from tests.support.disk import make_disk_tier

_LATE = FaultPlan(delay=0.5, delay_s=0.001)


class TestFaultyMemoryTier(TierContract):
    def make_tier(self, num_slots: int, layout: ChunkLayout) -> FaultyTier:
        size, device = num_slots * layout.slot_bytes, torch.device("cpu")
        inner = MemoryTier("cpu", capacity_bytes=size, layout=layout, device=device)
        return FaultyTier(inner, FaultPlan())


class TestFaultyDiskTier(TierContract):
    plan = FaultPlan()

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path / "disk"

    def make_tier(self, num_slots: int, layout: ChunkLayout) -> FaultyTier:
        return FaultyTier(make_disk_tier(self.directory, num_slots, layout), self.plan)


class TestLateDiskTier(TestFaultyDiskTier):
    plan = _LATE
