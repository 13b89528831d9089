"""Payloads of records that are not raw: encoded as a whole, decoded unit by unit."""

import time
from array import array
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import xxhash
from torch import Tensor

from offload.tiers.codec_ladder import codec_of
from offload.tiers.codecs import Codec
from offload.tiers.pool import page_aligned
from offload.tiers.read_meter import ReadMeter
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
    whole = xxhash.xxh3_64_intdigest(payload[: starts[-1]])
    return Stored(info, codec.number, fmt.coded_tokens, checksums, starts, whole), payload


def decode_record(
    fmt: RecordFormat, stored: Stored, payload: memoryview, out: Tensor, meter: ReadMeter
) -> None:
    """Decode a whole record.

    Parameters
    ----------
    fmt : RecordFormat
    stored : Stored
    payload : memoryview
        From its first byte on, verified; may be the memory of ``out``.
    out : Tensor, uint8 [slot_bytes]
    meter : ReadMeter

    Raises
    ------
    CorruptChunk
        The units are verified and still nothing that the codec writes.
    """
    kept = memoryview(bytes(payload[: stored.payload_bytes]))
    units = [kept[start:end] for start, end in pairwise(stored.starts)]
    decode_units(fmt, stored.codec, stored.unit_tokens, units, out[: fmt.payload_bytes], meter)


def decode_units(
    fmt: RecordFormat,
    codec: int,
    unit_tokens: int,
    units: Sequence[memoryview],
    out: Tensor,
    meter: ReadMeter,
) -> None:
    """Decode units of one kind, raw ones by copying them.

    Parameters
    ----------
    fmt : RecordFormat
    codec, unit_tokens : int
        What kind they are of.
    units : sequence of memoryview
        The bytes of each, verified.
    out : Tensor, uint8
        As many units, decoded; contiguous.
    meter : ReadMeter

    Raises
    ------
    CorruptChunk
        As ``decode_record``.
    """
    unit = fmt.unit(unit_tokens)
    if not codec:
        out.numpy()[:] = np.frombuffer(b"".join(units), np.uint8)
        return
    started = time.perf_counter()
    codec_of(codec).decode(units, unit, out.view(fmt.layout.dtype).view(-1, *unit.shape))
    meter.add_decoded(codec, out.numel(), time.perf_counter() - started)
