"""What is wanted of one record."""

from typing import NamedTuple

from offload.tiers.record_fill import Buffer
from offload.tiers.record_io import Place
from offload.types import ChunkInfo


class Part(NamedTuple):
    """What is wanted of one record.

    Attributes
    ----------
    place : tuple of int
        Segment and index.
    info : ChunkInfo
    first : int
        The unit of a raw record that it starts with.
    out : Buffer
        For whole units of a raw record.
    """

    place: Place
    info: ChunkInfo
    first: int
    out: Buffer
