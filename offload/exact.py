"""The exact policy: every query sees every key, wherever the key lives."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.kernels.dispatch import partial_attention
from offload.kernels.reference import merge, sink_partial
from offload.sequence import Appended
from offload.types import Partial

_UNMERGED_ELEMENTS = 1 << 20
"""Of outputs that wait to be merged. When decoding, merging parts one by one would take as long as
attending to some of them; after a long prompt they would take more memory than they save time."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One attention call of a model, apart from the keys and values.

    Attributes
    ----------
    query : Tensor, shape (batch, num_heads, num_queries, key_dim)
    scale : float
    mask : Tensor or None
        ``[batch, num_tokens]`` bool, False for padding: attention is causal on top. Or
        ``[batch or 1, num_heads or 1, num_queries, num_tokens]``, bool or additive: all there is.
    softcap : float or None
    window : int or None
        Sliding window in tokens.
    sinks : Tensor or None, shape (num_heads,)
        Learned attention sinks.
    expand : callable or None
        Turns cached latents ``(keys, values)``, each ``[batch, heads, tokens, dim]``, into the keys
        and values to attend (MLA).
    """

    query: Tensor
    scale: float
    mask: Tensor | None = None
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True, slots=True)
class PastChunks:
    """Chunks to attend together.

    Attributes
    ----------
    first_token : int
    rows : Tensor, shape (batch, num_chunks, num_kv_heads, chunk_tokens, row_dim)
        A view that is valid until the next one is asked for.
    """

    first_token: int
    rows: Tensor


def attend(
    call: AttentionCall,
    past: Iterable[PastChunks | Partial],
    appended: Appended,
    num_past_tokens: int,
    key_dim: int,
    sparse: Sequence[Partial] = (),
    late: Callable[[], Partial] | None = None,
) -> Tensor:
    """Attend to the past chunks, the tail and the new tokens, and merge.

    Past chunks are attended in the order in which they come, some of them already; at any time one
    group of them is on the device besides what lives there. ``call.expand`` is applied to what was
    cached, not to the new tokens' own keys and values, which the model has expanded itself.
    ``sparse`` is attention over past chunks that are not among them; ``late`` waits for more of it,
    and is called when everything else has been attended.

    Returns
    -------
    Tensor, shape (batch, num_queries, num_heads, value_dim), dtype of the query
    """
    query = call.query
    num_tail = appended.tail.shape[2]
    num_new = 0 if appended.keys is None else appended.keys.shape[2]
    first_query = num_past_tokens + num_tail + num_new - query.shape[2]
    parts = list(sparse)
    if appended.keys is not None and appended.values is not None:
        start = num_past_tokens + num_tail
        new = (appended.keys.unsqueeze(1), appended.values.unsqueeze(1))
        parts.append(_attend_chunks(call, *new, start, first_query))
    if num_tail:
        tail = PastChunks(num_past_tokens, appended.tail.unsqueeze(1))
        parts.append(_attend_cached(call, tail, key_dim, first_query))
    for each in past:
        parts = _few(parts)
        if isinstance(each, Partial):
            parts.append(each)
        else:
            parts.append(_attend_cached(call, each, key_dim, first_query))
    if late is not None:
        parts.append(late())
    if call.sinks is not None:
        parts.append(sink_partial(query, parts[0].out.shape[-1], call.sinks))
    merged = merge(parts) if len(parts) > 1 else parts[0]
    return merged.out.to(query.dtype).transpose(1, 2).contiguous()


def _few(parts: list[Partial]) -> list[Partial]:
    """Return the parts as they are, or as one if one more would take much memory."""
    is_much = len(parts) > 1 and (len(parts) + 1) * parts[0].out.numel() > _UNMERGED_ELEMENTS
    return [merge(parts)] if is_much else parts


def _attend_cached(
    call: AttentionCall, chunks: PastChunks, key_dim: int, first_query: int
) -> Partial:
    keys, values = chunks.rows[..., :key_dim], chunks.rows[..., key_dim:]
    if call.expand is not None:
        expanded = call.expand(_flatten(keys), _flatten(values))
        keys, values = (x.unsqueeze(1) for x in expanded)
    return _attend_chunks(call, keys, values, chunks.first_token, first_query)


def _attend_chunks(
    call: AttentionCall, keys: Tensor, values: Tensor, first_token: int, first_query: int
) -> Partial:
    num_keys = keys.shape[1] * keys.shape[3]
    is_dense = call.mask is not None and call.mask.ndim == 4
    return partial_attention(
        call.query,
        keys,
        values,
        scale=call.scale,
        bias=_bias(call.mask, first_token, num_keys),
        softcap=call.softcap,
        offset=None if is_dense else first_query - first_token,
        window=None if is_dense else call.window,
    )


def _bias(mask: Tensor | None, first_token: int, num_keys: int) -> Tensor | None:
    """Cut the columns of these keys out of a mask, as a bias; None if they hide nothing."""
    if mask is None:
        return None
    part = mask[..., first_token : first_token + num_keys]
    if part.dtype != torch.bool:
        return part
    if bool(part.all()):
        return None
    bias = torch.zeros(part.shape, dtype=torch.float32, device=part.device)
    bias.masked_fill_(~part, -math.inf)
    return bias[:, None, None, :] if bias.ndim == 2 else bias


def _flatten(chunks: Tensor) -> Tensor:
    return chunks.transpose(1, 2).flatten(2, 3)
