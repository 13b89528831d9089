"""Any sequence of calls on a store whose host holds codes: none is lost, none gets coarser twice.

Of ``fp8``, because what it has decoded once it encodes without a further loss.
"""

import torch
from hypothesis import settings
from torch import Tensor

from offload.tiers.base import Tier
from offload.tiers.codec_choice import CodecChoice
from offload.tiers.codec_fixed import find_fixed, slot_bytes_of, unit_of
from offload.tiers.coded import CodedTier
from offload.tiers.disk import DiskTier
from offload.tiers.kept_codes import KeptCodes
from offload.types import PAGE_BYTES, ChunkId
from tests.property.test_store_machine import (
    DEADLINE_S,
    DISK_SLOTS,
    LAYOUT,
    MEMORY_SLOTS,
    WRITE_BUFFERS,
    StoreMachine,
    make_tiers,
)

CODEC = find_fixed("fp8")
HOST = 1


def coarse(chunk: Tensor) -> Tensor:
    """Return what the codec leaves of a chunk."""
    unit, out = unit_of(LAYOUT), torch.empty(LAYOUT.shape)
    payloads = CODEC.encode(chunk.view(-1, *unit.shape), unit)
    CODEC.decode([memoryview(each) for each in payloads], unit, out.view(-1, *unit.shape))
    return out


class CodedStoreMachine(StoreMachine):
    """The disk holds chunks as they come."""

    disk_codec = "raw"

    def make_tiers(self) -> list[Tier]:
        device, host, disk = make_tiers(self.directory)
        host.close()
        disk.close()
        record_bytes = PAGE_BYTES + LAYOUT.slot_bytes
        choice = CodecChoice(LAYOUT.chunk_tokens, CODEC, float(self.disk_codec != "raw"))
        kept = KeptCodes(choice, WRITE_BUFFERS)
        return [
            device,
            CodedTier(
                "cpu",
                capacity_bytes=MEMORY_SLOTS * slot_bytes_of(CODEC, LAYOUT),
                layout=LAYOUT,
                codec=CODEC,
                kept=kept,
            ),
            DiskTier(
                self.directory,
                capacity_bytes=DISK_SLOTS * record_bytes,
                layout=LAYOUT,
                num_threads=2,
                segment_bytes=3 * record_bytes,
                deadline_s=DEADLINE_S,
                choose_codec=kept,
            ),
        ]

    def check_content(self, chunk: ChunkId) -> None:
        found, written = self.store.read_chunk(chunk), self.content[chunk]
        is_coarse = torch.equal(found, coarse(written))
        assert is_coarse or torch.equal(found, written)
        if self.store.level_of(chunk) == HOST:
            assert is_coarse


class AlikeStoreMachine(CodedStoreMachine):
    """The disk holds the same codes."""

    disk_codec = "fp8"


TestCodedStore = CodedStoreMachine.TestCase
TestCodedStore.settings = settings(stateful_step_count=40)
TestStoreOfTheSameCodes = AlikeStoreMachine.TestCase
TestStoreOfTheSameCodes.settings = settings(stateful_step_count=40)
