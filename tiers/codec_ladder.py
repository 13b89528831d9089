"""Every codec there is, from the largest payload to the smallest."""

from collections.abc import Mapping
from types import MappingProxyType

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.codec_exponents import ExponentCodec
from offload.tiers.codec_fp8 import Float8Codec
from offload.tiers.codec_int8 import Int8Codec
from offload.tiers.codec_kivi import KiviCodec
from offload.tiers.codec_raw import RawCodec
from offload.tiers.codecs import Codec

_LADDER: tuple[Codec, ...] = (
    RawCodec(),
    ExponentCodec(),
    Int8Codec(),
    Float8Codec(),
    KiviCodec(4),
    KiviCodec(2),
)

CODECS: Mapping[str, Codec] = MappingProxyType({codec.name: codec for codec in _LADDER})
"""By name."""

_BY_NUMBER = {codec.number: codec for codec in _LADDER}


def find_codec(name: str) -> Codec:
    """Return a codec by its name.

    Raises
    ------
    ConfigError
        There is none; names those that there are.
    """
    if name not in CODECS:
        raise ConfigError(f"there is no codec {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name]


def codec_of(number: int) -> Codec:
    """Return the codec that a record names.

    Raises
    ------
    CorruptChunk
        No codec has this number.
    """
    if number not in _BY_NUMBER:
        known = ", ".join(f"{codec.number} {codec.name}" for codec in _LADDER)
        raise CorruptChunk(f"codec number {number}; there are {known}")
    return _BY_NUMBER[number]
