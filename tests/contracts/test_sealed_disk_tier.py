"""A disk tier that encrypts keeps the contract of one that does not."""

from pathlib import Path

import pytest

from offload.tiers.disk import DiskTier
from offload.tiers.sealing import Sealer
from offload.types import PAGE_BYTES, ChunkLayout
from tests.contracts.tier_contract import TierContract


class TestSealedDiskTier(TierContract):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path / "disk"

    def make_tier(self, num_slots: int, layout: ChunkLayout) -> DiskTier:
        return DiskTier(
            self.directory,
            capacity_bytes=num_slots * (PAGE_BYTES + layout.slot_bytes),
            layout=layout,
            num_threads=2,
            sealer=Sealer.of_this_process(),
        )
