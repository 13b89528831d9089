"""What is asked of a disk tier: named in messages, and checked."""

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.buffers import Buffers
from offload.types import ChunkInfo, SlotId


def describe(tier: str, verb: str, infos: Sequence[ChunkInfo]) -> str:
    """Return how messages name a request for chunks."""
    if not infos:
        return f"{tier} {verb} of nothing"
    first = f"first of layer {infos[0].layer} from token {infos[0].first_token}"
    return f"{tier} {verb} of {len(infos)} chunks, {first}"


def no_record(what: str, missing: Sequence[SlotId], total: int) -> CorruptChunk:
    """Return the error of a request for slots of which some hold nothing."""
    return CorruptChunk(
        f"{what}: {len(missing)} of {total} slots hold no record (never written, failed or freed), "
        f"first slot {missing[0]}"
    )


def check_buffers(
    slots: Sequence[SlotId],
    infos: Sequence[ChunkInfo],
    buffers: Sequence[Tensor] | Buffers,
    num_bytes: int,
) -> None:
    """Raise ConfigError if buffers do not fit a request.

    Parameters
    ----------
    slots, infos, buffers
        Of equal length; the buffers contiguous ``uint8 [num_bytes]`` in host memory.
    num_bytes : int
    """
    if not len(slots) == len(infos) == len(buffers):
        raise ConfigError(
            f"{len(slots)} slots, {len(infos)} infos and {len(buffers)} buffers do not match"
        )
    if isinstance(buffers, Buffers):
        assert buffers.nbytes == num_bytes
        return
    for buffer in buffers:
        fits = buffer.dtype == torch.uint8 and buffer.shape == (num_bytes,)
        if not fits or buffer.device.type != "cpu" or not buffer.is_contiguous():
            raise ConfigError(
                f"a disk transfer takes contiguous uint8 [{num_bytes}] tensors in host memory, "
                f"not {buffer.dtype} {list(buffer.shape)} on {buffer.device}"
            )
