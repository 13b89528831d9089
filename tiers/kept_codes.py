"""Codes on their way from a host tier that encodes to the disk, so that none is encoded twice."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from offload.tiers.codecs import Codec, Unit
from offload.types import ChunkInfo


@dataclass(frozen=True, slots=True)
class _Kept:
    """A codec that knows the answer: what it is asked to encode has just been decoded by it."""

    codec: Codec
    unit: Unit
    payloads: list[bytes]

    @property
    def name(self) -> str:
        return self.codec.name

    @property
    def number(self) -> int:
        return self.codec.number

    @property
    def is_lossless(self) -> bool:
        return self.codec.is_lossless

    def max_bytes(self, unit: Unit) -> int:
        return self.codec.max_bytes(unit)

    def encode(self, rows: Tensor, unit: Unit) -> list[bytes]:
        is_same = unit == self.unit and len(rows) == len(self.payloads)
        return self.payloads if is_same else self.codec.encode(rows, unit)

    def decode(self, payloads: Sequence[memoryview], unit: Unit, out: Tensor) -> None:
        self.codec.decode(payloads, unit, out)


class KeptCodes:
    """Says how chunks are stored, for ``DiskTier(choose_codec=...)``: as they are, if they can be.

    Chunks travel decoded, so that they can be read on their way. What they were decoded from is
    kept beside them, of the latest ones: as many as can be on their way at a time. A chunk that is
    to be stored by the codec that it comes from becomes the same bytes again. Any thread may call.

    Parameters
    ----------
    choose : callable
        Says how chunks are stored otherwise.
    most : int
        Chunks whose codes are kept.
    """

    def __init__(self, choose: Callable[[ChunkInfo], Codec | None], most: int) -> None:
        self._choose = choose
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[ChunkInfo, _Kept] = OrderedDict()

    def keep(self, info: ChunkInfo, codec: Codec, unit: Unit, payloads: list[bytes]) -> None:
        """Remember what a chunk was decoded from, and forget the oldest one instead."""
        with self._lock:
            self._kept[info] = _Kept(codec, unit, payloads)
            self._kept.move_to_end(info)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)

    def __call__(self, info: ChunkInfo) -> Codec | None:
        """Return the codec of a chunk; None: raw."""
        chosen = self._choose(info)
        with self._lock:
            kept = self._kept.get(info)
        is_same = kept is not None and chosen is not None and kept.number == chosen.number
        return kept if is_same else chosen
