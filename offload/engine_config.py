"""What an engine is built from."""

from dataclasses import dataclass

from offload.placement import FIRST
from offload.presets import Preset
from offload.tiers.faults import FaultPlan
from offload.tiers.scratch import ScratchDir
from offload.tiers.sealing import Sealer

AUTO = "auto"
"""A codec: whatever the model of the pipeline says."""

BY_IMPORTANCE = "importance"
"""A codec: the fewer bits, the less attention a chunk has got."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine is built from.

    Attributes
    ----------
    capacities : dict of str to int
        Bytes of each tier, fastest first: an ordered subset of ``gpu``, ``cpu``, ``disk``,
        ``remote``.
    preset : Preset
    chunk_tokens : int
    scratch : ScratchDir or None
        Where the disk tier writes.
    more_scratch : tuple of ScratchDir
        On further disks, among which a preset that attends beside them divides the heads.
    remote_url : str or None
        Of the object store that takes what the disk has no room for.
    sealer : Sealer or None
        Encrypts what the disk tier writes.
    deadline_s : float
        Longest wait for one transfer.
    faults : FaultPlan or None
        What the disk tier is to suffer, to try out a failing disk.
    codec : str
        How the disk tier stores chunks: a name of ``codec_ladder``, ``AUTO`` or ``BY_IMPORTANCE``.
    host_codec : str
        How the host tier holds chunks: ``"raw"``, or a name of ``codec_fixed``.
    placement : str
        A name of ``PLACEMENTS``.
    """

    capacities: dict[str, int]
    preset: Preset
    chunk_tokens: int
    scratch: ScratchDir | None
    deadline_s: float = 120.0
    faults: FaultPlan | None = None
    codec: str = "raw"
    host_codec: str = "raw"
    placement: str = FIRST
    more_scratch: tuple[ScratchDir, ...] = ()
    remote_url: str | None = None
    sealer: Sealer | None = None

    def codec_of(self, tier: str) -> str:
        """Return the codec of a tier by its name."""
        return {"cpu": self.host_codec, "disk": self.codec}.get(tier, "raw")

    def close_scratch(self) -> None:
        """Remove the folders of the disk tier."""
        for scratch in (self.scratch, *self.more_scratch):
            if scratch is not None:
                scratch.close()
