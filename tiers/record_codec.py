"""Payloads of records that are not raw: encoded as a whole, decoded unit by unit."""

from array import array
from itertools import accumulate, pairwise

from torch import Tensor

from offload.tiers.codec_ladder import codec_of
from offload.tiers.codecs import Codec
from offload.tiers.pool import page_aligned
from offload.tiers.record import RecordFormat, Stored, checksums_of
from offload.types import ChunkInfo, round_up

_WORTH_IT = 0.92
"""Of the raw bytes: a codec that saves less costs more than it gains."""


def encode_record(
    fmt: RecordFormat, info: ChunkInfo, source: Tensor, codec: Codec
) -> tuple[Stored, memoryview] | None:
    """Encode a chunk.

    Parameters
    ----------
    fmt : RecordFormat
    info : ChunkInfo
    source : Tensor, uint8 [slot_bytes]
        Contiguous, on the host.
    codec : Codec

    Returns
    -------
    tuple of Stored and memoryview, or None
        What the header is to say, and the payload, padded to whole pages and page-aligned. None:
        it is as well stored raw, because the codec saves too little, or the layout has too many
        heads for it.
    """
    if not fmt.coded_tokens:
        return None
    unit = fmt.unit(fmt.coded_tokens)
    rows = source[: fmt.payload_bytes].view(fmt.layout.dtype).view(-1, *unit.shape)
    units = codec.encode(rows, unit)
    starts = array("I", accumulate(map(len, units), initial=0))
    if starts[-1] > _WORTH_IT * fmt.payload_bytes:
        return None
    payload = page_aligned(round_up(starts[-1])).numpy().data
    payload[: starts[-1]] = b"".join(units)
    checksums = array("Q", checksums_of(payload, starts))
    return Stored(info, codec.number, fmt.coded_tokens, checksums, starts), payload


def decode_record(fmt: RecordFormat, stored: Stored, payload: memoryview, out: Tensor) -> None:
    """Decode a whole record.

    Parameters
    ----------
    fmt : RecordFormat
    stored : Stored
    payload : memoryview
        From its first byte on, verified; may be the memory of ``out``.
    out : Tensor, uint8 [slot_bytes]

    Raises
    ------
    CorruptChunk
        The units are verified and still nothing that the codec writes.
    """
    kept = memoryview(bytes(payload[: stored.payload_bytes]))
    decode_units(fmt, stored, kept, 0, out[: fmt.payload_bytes])


def decode_units(
    fmt: RecordFormat, stored: Stored, data: memoryview, first: int, out: Tensor
) -> None:
    """Decode consecutive units, those of raw records by copying them.

    Parameters
    ----------
    fmt : RecordFormat
    stored : Stored
    data : memoryview
        The bytes of these units, verified.
    first : int
        The unit that ``data`` starts with.
    out : Tensor, uint8
        As many units, decoded; contiguous.

    Raises
    ------
    CorruptChunk
        As ``decode_record``.
    """
    if not stored.codec:
        out.numpy().data[:] = data
        return
    unit = fmt.unit(stored.unit_tokens)
    rows = out.view(fmt.layout.dtype).view(-1, *unit.shape)
    starts = stored.starts[first : first + len(rows) + 1]
    units = [data[start - starts[0] : end - starts[0]] for start, end in pairwise(starts)]
    codec_of(stored.codec).decode(units, unit, rows)
