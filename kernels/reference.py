"""Partial attention in plain torch: the definition that every faster kernel is tested against.

Keys and values come as chunks, ``[batch, num_chunks, num_kv_heads, chunk_tokens, dim]``, usually
as strided views of a pool, so that nothing has to be copied to be attended. Scores, the softmax and
the merge are computed in float32 (float64 for float64 inputs).
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from offload.types import Partial

_MAX_SCORE_ELEMENTS = 1 << 22
"""Scores held at a time; bounds the workspace to 16 MiB of float32 whatever the query length."""

_MAX_SCORE_ELEMENTS_DEVICE = 1 << 25
"""The same on an accelerator, which needs larger blocks to be busy: 128 MiB."""


def empty_partial(query: Tensor, value_dim: int) -> Partial:
    """Return attention over no keys: zero output, ``lse = -inf``.

    Parameters
    ----------
    query : Tensor, shape (batch, num_heads, num_queries, key_dim)
    value_dim : int
    """
    out = query.new_zeros((*query.shape[:3], value_dim), dtype=_accumulator(query))
    return Partial(out, torch.full_like(out[..., 0], -math.inf))


def sink_partial(query: Tensor, value_dim: int, sinks: Tensor) -> Partial:
    """Return the partial of learned attention sinks: weight in the softmax, no value.

    Parameters
    ----------
    query : Tensor, shape (batch, num_heads, num_queries, key_dim)
    value_dim : int
    sinks : Tensor, shape (num_heads,)
        The logit of each head's sink (gpt-oss).
    """
    out, lse = empty_partial(query, value_dim)
    return Partial(out, lse.copy_(sinks.to(lse.dtype).view(1, -1, 1)))


def merge(parts: Sequence[Partial]) -> Partial:
    """Combine attention over disjoint sets of keys into attention over their union.

    ``M = max lse_i``, ``w_i = exp(lse_i - M)``, ``out = sum w_i out_i / sum w_i``,
    ``lse = M + log sum w_i``. Exact up to rounding; order does not matter; empty parts are ignored.
    """
    lses = torch.stack([part.lse for part in parts])
    peak = lses.amax(0).nan_to_num(neginf=0.0)
    weights = (lses - peak).exp()
    total = weights.sum(0)
    out = torch.zeros_like(parts[0].out)
    for part, weight in zip(parts, weights, strict=True):
        out.addcmul_(part.out, weight.unsqueeze(-1))
    out /= total.clamp_min(torch.finfo(total.dtype).tiny).unsqueeze(-1)
    return Partial(out, peak + total.log())


def gather_chunks(pool: Tensor, slots: Tensor) -> Tensor:
    """Copy chunks out of a pool.

    Parameters
    ----------
    pool : Tensor, shape (num_slots, num_kv_heads, chunk_tokens, row_dim)
    slots : Tensor, shape (batch, num_chunks), int64

    Returns
    -------
    Tensor, shape (batch, num_chunks, num_kv_heads, chunk_tokens, row_dim)
    """
    return pool[slots]


def partial_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    offset: int | None = None,
    window: int | None = None,
) -> Partial:
    """Attend with all queries over a part of the keys.

    Parameters
    ----------
    query : Tensor, shape (batch, num_heads, num_queries, key_dim)
    keys : Tensor, shape (batch, num_chunks, num_kv_heads, chunk_tokens, key_dim)
    values : Tensor, shape (batch, num_chunks, num_kv_heads, chunk_tokens, value_dim)
        Strided views are welcome. Head ``h`` of the query reads KV head
        ``h // (num_heads // num_kv_heads)``.
    scale : float
        Multiplies the scores.
    bias : Tensor, shape (batch or 1, num_heads or 1, num_queries or 1, num_keys), optional
        Added to the scores after ``scale`` and ``softcap``; ``-inf`` hides a key. Padding.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
    offset : int, optional
        Position of the first query minus position of the first key. With it, attention is causal:
        query ``i`` sees key ``j`` only if ``j <= i + offset``.
    window : int, optional
        Needs ``offset``. Query ``i`` sees key ``j`` only if ``j > i + offset - window``.

    Returns
    -------
    Partial
        Queries that see no key have zero output and ``lse = -inf``.
    """
    dtype = _accumulator(query)
    flat_keys, flat_values = _flatten(keys).to(dtype), _flatten(values).to(dtype)
    batch, num_heads, num_queries, _ = query.shape
    num_keys = flat_keys.shape[2]
    result = empty_partial(query, values.shape[-1])
    limit = _MAX_SCORE_ELEMENTS if query.device.type == "cpu" else _MAX_SCORE_ELEMENTS_DEVICE
    for rows in _blocks(num_queries, max(1, limit // max(1, batch * num_heads * num_keys))):
        seen = _visible(rows, num_keys, offset, window)
        if seen.start >= seen.stop:
            continue
        scores = _scores(query[:, :, rows].to(dtype), flat_keys[:, :, seen]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, rows])[..., seen]
        if offset is not None:
            hidden = _hidden(rows, seen, offset, window, scores.device)
            scores.masked_fill_(hidden, -math.inf)
        peak = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weights = (scores - peak).exp_()
        total = weights.sum(-1, keepdim=True)
        out = _weighted(weights, flat_values[:, :, seen])
        result.out[:, :, rows] = out / total.clamp_min(torch.finfo(dtype).tiny)
        result.lse[:, :, rows] = (peak + total.log()).squeeze(-1)
    return result


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """``[batch, heads, rows, keys]``; the members of a GQA group are folded into the rows."""
    folded = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    scores: Tensor = folded @ keys.transpose(-1, -2)
    return _split_rows(scores, query.shape[2])


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    folded = weights.unflatten(1, (values.shape[1], -1)).flatten(2, 3)
    out: Tensor = folded @ values
    return _split_rows(out, weights.shape[2])


def _split_rows(folded: Tensor, num_queries: int) -> Tensor:
    """``[batch, kv_heads, group * queries, dim]`` to ``[batch, heads, queries, dim]``."""
    batch, num_kv_heads, rows, dim = folded.shape
    return folded.reshape(batch, num_kv_heads * rows // num_queries, num_queries, dim)


def _accumulator(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _flatten(chunks: Tensor) -> Tensor:
    """``[batch, chunks, heads, tokens, dim]`` to ``[batch, heads, chunks * tokens, dim]``."""
    return chunks.transpose(1, 2).flatten(2, 3)


def _blocks(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _visible(rows: slice, num_keys: int, offset: int | None, window: int | None) -> slice:
    """Return the keys that at least one of these rows may see."""
    if offset is None:
        return slice(0, num_keys)
    first = 0 if window is None else max(0, rows.start + offset - window + 1)
    return slice(first, max(first, min(num_keys, rows.stop + offset)))


def _hidden(
    rows: slice, keys: slice, offset: int, window: int | None, device: torch.device
) -> Tensor:
    position = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1) + offset
    key = torch.arange(keys.start, keys.stop, device=device)
    hidden = key > position
    return hidden if window is None else hidden | (key <= position - window)
