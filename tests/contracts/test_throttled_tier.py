"""A tier behind a link keeps the contract of a tier."""

from pathlib import Path

import pytest
import torch

from offload.tiers.base import Tier
from offload.tiers.memory import MemoryTier
from offload.tiers.throttled import SerialLink, ThrottledTier
from offload.tiers.virtual_clock import VirtualClock
from offload.types import ChunkLayout
from tests.contracts.tier_contract import TierContract
from tests.support.disk import make_disk_tier


def make_link() -> SerialLink:
    """Return a link on which the contract takes minutes, of nobody's time."""
    return SerialLink(1e6, 0.1, VirtualClock())


class TestThrottledMemoryTier(TierContract):
    def make_tier(self, num_slots: int, layout: ChunkLayout) -> Tier:
        size, device = num_slots * layout.slot_bytes, torch.device("cpu")
        inner = MemoryTier("cpu", capacity_bytes=size, layout=layout, device=device)
        return ThrottledTier(inner, make_link())


class TestThrottledDiskTier(TierContract):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path / "disk"

    def make_tier(self, num_slots: int, layout: ChunkLayout) -> Tier:
        disk = make_disk_tier(self.directory, num_slots, layout)
        return ThrottledTier(disk, make_link())
