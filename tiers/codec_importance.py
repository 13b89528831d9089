"""The less attention a chunk has got, the fewer bits it is stored in."""

import threading
from collections.abc import Mapping
from typing import Final

import numpy as np

from offload.tiers.codec_ladder import find_codec
from offload.tiers.codecs import Codec
from offload.types import ChunkId, ChunkInfo

UNKNOWN: Final = "int8"
"""For chunks of which nothing is known: they have just been made, or nothing was observed yet."""

_LADDER: Final = ("kivi2", "kivi4", None)
_CUTS: Final = (0.25, 0.75)
"""Of the chunks that got attention of late: the lower quarter, the middle half, the upper one."""

_DECAY: Final = 0.8
_NOTHING: Final = 1e-9
"""Averages below this are none; half of one is left after three steps."""


class CodecByImportance:
    """Says how each chunk is stored, for ``DiskTier(choose_codec=...)``, by a moving average.

    Of the chunks that got attention lately the upper quarter is stored raw, the next half in 4 bits
    and the lowest quarter in 2, as are those that got none. What is on disk already stays as it
    is: only a chunk that is written is encoded. Any thread may call any method.

    Takes eight bytes for each chunk there ever was.

    Notes
    -----
    MiKV (arXiv:2402.18096), over chunks instead of tokens: what matters less is kept in lower
    precision instead of being dropped. The shares are ours.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._averages = np.zeros(0)
        self._cuts = np.zeros(len(_CUTS))

    def observe(self, masses: Mapping[ChunkId, float]) -> None:
        """Take note of how much attention chunks got in one step; see ``EvictionPolicy``."""
        if not masses:
            return
        ids = np.fromiter(masses.keys(), np.int64, len(masses))
        new = np.fromiter(masses.values(), np.float64, len(masses))
        with self._lock:
            missing = int(ids.max()) + 1 - len(self._averages)
            self._averages = np.pad(self._averages * _DECAY, (0, max(0, missing)))
            self._averages[ids] += (1 - _DECAY) * new
            known = self._averages[self._averages > _NOTHING]
            self._cuts = np.quantile(known, _CUTS) if len(known) else np.zeros(len(_CUTS))

    def __call__(self, info: ChunkInfo) -> Codec | None:
        """Return the codec of a chunk; None: raw."""
        with self._lock:
            if info.chunk_id >= len(self._averages):
                return find_codec(UNKNOWN)
            average = self._averages[info.chunk_id]
            rank = int(np.searchsorted(self._cuts, average, side="right"))
        name = _LADDER[rank if average > _NOTHING else 0]
        return None if name is None else find_codec(name)
