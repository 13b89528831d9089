"""Attention over chunks that the host holds encoded: on the codes, where nothing is hidden."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from offload.exact import AttentionCall, PastChunks
from offload.tiers.coded import CodedTier
from offload.types import Partial

_DECODED_BYTES = 8 << 20
"""Of chunks that are decoded together, because queries are too many, or see a part of them."""

Ints = NDArray[np.int64]


def read_codes(
    tier: CodedTier, slots: Ints, first_token: int, call: AttentionCall, first_query: int
) -> Iterator[PastChunks | Partial]:
    """Attend to chunks, or decode what has to be attended otherwise, a few of them at a time.

    Parameters
    ----------
    tier : CodedTier
    slots : ndarray, int64 [batch, num_chunks]
        Consecutive chunks.
    first_token : int
        Position of the first one's first token.
    call : AttentionCall
    first_query : int
        Position of the first query.
    """
    size = tier.layout.chunk_tokens
    plain = _plain_chunks(call, first_token, slots.shape[1], size, first_query)
    for is_plain, run in groupby(range(slots.shape[1]), plain.__getitem__):
        own = list(run)
        some = slots[:, own[0] : own[-1] + 1]
        part = tier.attend(call.query, some, call.scale) if is_plain else None
        if part is not None:
            yield part
            continue
        at_once = max(1, _DECODED_BYTES // (len(slots) * tier.layout.chunk_bytes))
        for start in range(0, len(own), at_once):
            token = first_token + (own[0] + start) * size
            yield PastChunks(token, tier.decoded(some[:, start : start + at_once]))


def _plain_chunks(
    call: AttentionCall, first_token: int, count: int, size: int, first_query: int
) -> list[bool]:
    """Return of which chunks every query sees every token, its score being changed by nothing."""
    if call.softcap is not None or call.expand is not None:
        return [False] * count
    mask, end = call.mask, first_token + count * size
    if mask is not None and mask.dtype != torch.bool:
        return [False] * count
    is_seen = torch.ones(count, dtype=torch.bool)
    if mask is not None:
        part = mask[..., first_token:end].unflatten(-1, (count, size)).all(-1)
        is_seen = part.flatten(0, -2).all(0).cpu()
    if call.window is not None and (mask is None or mask.ndim == 2):
        first_seen = first_query + call.query.shape[2] - call.window
        is_seen &= first_token + size * torch.arange(count) >= first_seen
    seen: list[bool] = is_seen.tolist()
    return seen
