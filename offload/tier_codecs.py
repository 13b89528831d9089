"""How the tiers of one engine encode what they hold."""

from typing import TYPE_CHECKING

from offload.engine_config import AUTO, BY_IMPORTANCE, EngineConfig
from offload.tiers.codec_choice import CodecChoice
from offload.tiers.codec_fixed import find_fixed, slot_bytes_of
from offload.tiers.codec_importance import UNKNOWN, CodecByImportance
from offload.tiers.codec_ladder import find_codec
from offload.tiers.coded import CodedTier
from offload.tiers.kept_codes import KeptCodes
from offload.types import ChunkLayout

if TYPE_CHECKING:
    from offload.tiers.record_io import ChooseCodec


class TierCodecs:
    """What the host and the disk of an engine encode with.

    Parameters
    ----------
    config : EngineConfig
    layout : ChunkLayout
    num_leaving : int
        Chunks that can be on their way from the host to the disk at a time.

    Attributes
    ----------
    disk : CodecChoice
        The codec of the disk, which the model of the pipeline may change.
    importance : CodecByImportance or None
        What decides instead.
    choose : callable
        For the disk tier: one of these, or what reuses the codes of the host.
    host_bytes : int
        Host memory beside the tier: codes on their way down, and a chunk that is being encoded.

    Raises
    ------
    ConfigError
        The host's codec does not encode such chunks.
    """

    def __init__(self, config: EngineConfig, layout: ChunkLayout, num_leaving: int) -> None:
        fixed = {AUTO: "raw", BY_IMPORTANCE: UNKNOWN}.get(config.codec, config.codec)
        self.disk = CodecChoice(layout.chunk_tokens, find_codec(fixed))
        self.importance = CodecByImportance() if config.codec == BY_IMPORTANCE else None
        self.choose: ChooseCodec = self.importance or self.disk
        self.host_bytes = 0
        self._layout = layout
        self._kept: KeptCodes | None = None
        self._host = None if config.host_codec == "raw" else find_fixed(config.host_codec)
        if self._host is None:
            return
        self.host_bytes = layout.slot_bytes
        if "disk" in config.capacities and config.codec in (AUTO, BY_IMPORTANCE, self._host.name):
            self.choose = self._kept = KeptCodes(self.choose, num_leaving)
            self.host_bytes += num_leaving * slot_bytes_of(self._host, layout)

    def open_host(self, capacity_bytes: int, num_streams: int) -> CodedTier | None:
        """Return a host tier that encodes; None if it is to hold chunks as they are."""
        if self._host is None:
            return None
        return CodedTier(
            "cpu",
            capacity_bytes=capacity_bytes,
            layout=self._layout,
            codec=self._host,
            num_streams=num_streams,
            kept=self._kept,
        )
