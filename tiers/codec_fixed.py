"""Codecs of fixed rate: every unit becomes as many bytes as every other, so it can have a slot."""

from collections.abc import Mapping
from types import MappingProxyType

from offload.errors import ConfigError
from offload.tiers.codec_fp8 import Float8Codec
from offload.tiers.codec_int8 import Int8Codec
from offload.tiers.codec_kivi import KiviCodec
from offload.tiers.codecs import Codec, Unit
from offload.types import ChunkLayout, round_up

CODED_TOKENS = 64
"""Of a unit, as in records on disk: payloads can then go there as they are."""

UNIT_ALIGNMENT = 64
"""Bytes: units in memory begin at cache lines."""

FIXED: Mapping[str, Codec] = MappingProxyType(
    {
        codec.name: codec
        for codec in (Int8Codec(is_packing=False), Float8Codec(), KiviCodec(4), KiviCodec(2))
    }
)
"""By name; numbers and payloads are those of ``codec_ladder``, whose ``int8`` may pack them."""


def find_fixed(name: object) -> Codec:
    """Return a codec of fixed rate by its name.

    Raises
    ------
    ConfigError
        There is none; names those that there are.
    """
    if not isinstance(name, str) or name not in FIXED:
        raise ConfigError(
            f"codec {name!r} has no fixed rate, which slots in memory need; "
            f"those that have: {', '.join(FIXED)}"
        )
    return FIXED[name]


def unit_of(layout: ChunkLayout) -> Unit:
    """Return what is encoded together: 64 tokens where that divides a chunk, else all of it."""
    tokens = CODED_TOKENS if layout.chunk_tokens % CODED_TOKENS == 0 else layout.chunk_tokens
    return Unit(tokens, layout.key_dim, layout.value_dim, layout.dtype)


def slot_bytes_of(codec: Codec, layout: ChunkLayout) -> int:
    """Return the bytes that the codes of a chunk take in memory.

    Raises
    ------
    ConfigError
        The codec does not encode the layout's dtype, or makes chunks of it no smaller.
    """
    unit = unit_of(layout)
    num_units = layout.num_kv_heads * layout.chunk_tokens // unit.num_tokens
    slot_bytes = num_units * round_up(codec.max_bytes(unit), UNIT_ALIGNMENT)
    if slot_bytes >= layout.slot_bytes:
        raise ConfigError(
            f"{codec.name} makes {slot_bytes} bytes of chunks that take {layout.slot_bytes} as "
            f"they are: {layout}"
        )
    return slot_bytes
