"""SparF: attention that finds its tokens in a few channels of the keys, and estimates the rest.

For one KV head and the queries of its group: the channels where the queries are largest give
approximate logits of all tokens; the groups of tokens with most of their softmax are attended
exactly; all others are taken to have the mean value (Pan et al., InstInfer, arXiv:2409.04992, after
Ribar et al., SparQ, arXiv:2312.04985). Unlike there, whole groups of tokens are chosen, for all
queries of a KV head together, and the result has a log-sum-exp, so that it merges with others.

Queries are scaled by ``1 / sqrt(key_dim)`` already. No function keeps state; any thread may call,
and what is compiled runs on that thread, without the GIL. ``kernels.sparf_plain`` does the same
where numba is not installed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.errors import ConfigError
from offload.kernels import sparf_plain
from offload.kernels.dispatch import compiled
from offload.kernels.rows import attend_to
from offload.types import Partial

Floats = NDArray[np.float32]
Places = NDArray[np.int64]

_BITS: dict[torch.dtype, type] = {torch.bfloat16: np.uint16, torch.float16: np.int16}
_LEAST_ALPHA = np.finfo(np.float32).tiny


class ChannelCodes(NamedTuple):
    """Keys, channel by channel, in 8 bits: ``codes * scales[..., None]``.

    Attributes
    ----------
    codes : int8 [num_heads, key_dim, num_tokens]
        From -127 to 127.
    scales : float32 [num_heads, key_dim]
        Zero where all codes are.
    """

    codes: NDArray[np.int8]
    scales: Floats


class Channels(NamedTuple):
    """Where queries are largest.

    Attributes
    ----------
    numbers : int64 [num_heads, num_channels]
        Ascending.
    coverage : float32 [num_heads, num_queries]
        Share that these channels have of the sum of a query's absolute values; 1 for a query that
        is zero in all of them.
    """

    numbers: Places
    coverage: Floats


class Groups(NamedTuple):
    """Which groups of tokens are worth reading.

    Attributes
    ----------
    numbers : int64 [num_heads, num_chosen]
        Ascending.
    alpha : float32 [num_heads, num_queries]
        Share of the approximate softmax that each query has in them, in (0, 1].
    """

    numbers: Places
    alpha: Floats


def encode_channels(keys: Tensor) -> ChannelCodes:
    """Round keys to 8 bits, with one scale for each channel: its largest absolute value / 127.

    Parameters
    ----------
    keys : Tensor, shape (num_heads, num_tokens, key_dim), any float dtype, on the CPU
        At least one token. What is not finite has no part in the scale: infinities get the largest
        code, NaN gets zero. A channel that stays below 2**-100 is zero.
    """
    fast = compiled("cpu_sparf_codes")
    if fast is None:
        return ChannelCodes(*sparf_plain.encode_channels(keys))
    own = (keys if keys.dtype in _BITS else keys.float()).contiguous()
    bits = _BITS.get(own.dtype)
    rows = own.numpy() if bits is None else own.view(torch.int16).numpy().view(bits)
    num_heads, num_tokens, key_dim = keys.shape
    codes = np.empty((num_heads, key_dim, num_tokens), np.int8)
    scales = np.empty((num_heads, key_dim), np.float32)
    fast.encode_channels(rows, codes, scales)
    return ChannelCodes(codes, scales)


def join_codes(parts: Sequence[tuple[NDArray[np.int8], Floats]]) -> ChannelCodes:
    """Put codes of consecutive tokens together, with the largest of the scales of each channel.

    Parameters
    ----------
    parts : sequence of (codes, scales)
        At least one, each as in ``ChannelCodes``.
    """
    own = [np.ascontiguousarray(codes, np.int8) for codes, _ in parts]
    part_scales = np.stack([scales for _, scales in parts]).astype(np.float32, copy=False)
    fast = compiled("cpu_sparf_codes")
    if fast is None:
        return ChannelCodes(*sparf_plain.join_codes(own, part_scales))
    lengths = np.array([codes.shape[2] for codes in own])
    codes = np.empty((*own[0].shape[:2], int(lengths.sum())), np.int8)
    scales = np.empty(codes.shape[:2], np.float32)
    addresses = np.array([part.ctypes.data for part in own])
    fast.join_codes(addresses, lengths, part_scales, codes, scales)
    return ChannelCodes(codes, scales)


def choose_channels(query: Floats, num_channels: int) -> Channels:
    """Choose the channels where the absolute values of a head's queries have the largest sum.

    Parameters
    ----------
    query : float32 [num_heads, num_queries, key_dim]
        Finite.
    num_channels : int
        All, if there are no more. Of equal channels the lower ones are chosen.
    """
    size = np.abs(query)
    numbers = np.argsort(-size.sum(1), -1, kind="stable")[:, :num_channels]
    numbers.sort(-1)
    inside = np.take_along_axis(size, numbers[:, None], 2).sum(2)
    coverage = np.where(inside > 0, inside / np.where(inside > 0, size.sum(2), 1), 1)
    return Channels(numbers, coverage.astype(np.float32, copy=False))


def approximate(
    query: Floats,
    channels: Places,
    coverage: Floats,
    addresses: Places,
    scales: Floats,
    block: Places,
    column: Places,
    piece_tokens: int,
) -> Floats:
    """Return logits from some channels, whose codes lie anywhere in memory.

    ``query[channels] . keys[channels] / sqrt(coverage)``: so the softmax is about as peaked as it
    is with all channels (SparQ, section 4).

    Parameters
    ----------
    query : float32 [num_heads, num_queries, key_dim]
    channels, coverage : int64 [num_heads, num_channels], float32 [num_heads, num_queries]
        As in ``Channels``.
    addresses : int64 [num_blocks, num_heads, num_channels]
        Host address of the first code of each channel of each block of tokens. Whoever calls keeps
        the memory alive.
    scales : float32 [num_blocks, num_heads, num_channels]
    block, column : int64 [num_pieces]
        Where pieces are: ``piece_tokens`` tokens of a block from ``column * piece_tokens`` on. In
        any order; those of one block are best together.
    piece_tokens : int
        Best a multiple of 64, or at least of 16.

    Returns
    -------
    float32 [num_heads, num_queries, num_pieces * piece_tokens]
    """
    fast: Any = compiled("cpu_sparf") or sparf_plain
    # The compiled one reads at these addresses: a wrong dtype must not get there.
    logits: Floats = fast.approximate(
        np.ascontiguousarray(query, np.float32),
        np.ascontiguousarray(channels, np.int64),
        np.ascontiguousarray(coverage, np.float32),
        np.ascontiguousarray(addresses, np.int64),
        np.ascontiguousarray(scales, np.float32),
        np.ascontiguousarray(block, np.int64),
        np.ascontiguousarray(column, np.int64),
        piece_tokens,
    )
    return logits


def choose_groups(
    logits: Floats, group_tokens: int, num_groups: int, least: float | None = None
) -> Groups:
    """Choose the groups of tokens with most of the softmax, summed over a head's queries.

    Parameters
    ----------
    logits : float32 [num_heads, num_queries, num_tokens]
        ``-inf`` hides a token, and NaN counts as that. If a query sees none, it wants all alike.
    group_tokens : int
        Divides ``num_tokens``.
    num_groups : int
        To choose, at least one; all, if there are no more. Of equal ones the first are chosen.
    least : float, optional
        Share of the softmax that is enough: no more groups are chosen than it takes for every query
        to have so much in them. Each head gets as many as the head that needs most.

    Raises
    ------
    ConfigError
        No tokens, or a last group that is not whole.
    """
    num_tokens = logits.shape[2]
    if num_tokens == 0 or num_tokens % group_tokens:
        raise ConfigError(
            f"groups of {group_tokens} tokens cannot be chosen from {num_tokens} tokens"
        )
    fast: Any = compiled("cpu_sparf") or sparf_plain
    num_chosen = min(num_groups, num_tokens // group_tokens)
    rows = np.ascontiguousarray(logits, np.float32)
    groups, shares = fast.choose_groups(rows, group_tokens, num_chosen)
    if least is not None:
        groups, shares = _drop_small(groups, shares, least)
    return Groups(groups, shares.sum(-1).clip(_LEAST_ALPHA, 1))


def _drop_small(groups: Places, shares: Floats, least: float) -> tuple[Places, Floats]:
    """Return as few of the groups as leave every query its least share."""
    order = np.argsort(-shares.sum(1), -1, kind="stable")
    sums = np.take_along_axis(shares, order[:, None], 2).cumsum(2)
    kept = np.sort(order[:, : 1 + int((sums < least).sum(2).max())], -1)
    return np.take_along_axis(groups, kept, 1), np.take_along_axis(shares, kept[:, None], 2)


def finish(out: Floats, lse: Floats, alpha: Floats, mean: Floats) -> tuple[Floats, Floats]:
    """Add what was not read to what was attended.

    Parameters
    ----------
    out, lse : float32 [num_heads, num_queries, value_dim], [num_heads, num_queries]
        Of the tokens that were read.
    alpha : float32 [num_heads, num_queries]
        Share of the softmax that they have.
    mean : float32 [num_heads, value_dim]
        Of the values of all tokens, which stands for those that were not read.

    Returns
    -------
    out, lse
        Of all tokens.
    """
    share = alpha[..., None]
    return share * out + (1 - share) * mean[:, None], lse - np.log(alpha)


def sparf(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    num_channels: int,
    num_groups: int,
    group_tokens: int,
) -> Partial:
    """Attend as described above to keys that are all at hand and not rounded: the algorithm.

    Parameters
    ----------
    query : Tensor, shape (num_heads, num_queries, key_dim), float32
    keys : Tensor, shape (num_heads, num_tokens, key_dim)
    values : Tensor, shape (num_heads, num_tokens, value_dim)
    num_channels, num_groups, group_tokens : int
        As for ``choose_channels`` and ``choose_groups``.

    Returns
    -------
    Partial
        ``out`` [num_heads, num_queries, value_dim], ``lse`` [num_heads, num_queries]. With all
        groups it is exact.
    """
    channels, coverage = choose_channels(query.numpy(), num_channels)
    places = torch.from_numpy(channels).unsqueeze(1)
    asked = query.take_along_dim(places, 2) / torch.from_numpy(coverage).sqrt().unsqueeze(-1)
    logits = asked @ keys.float().take_along_dim(places, 2).mT
    groups, alpha = choose_groups(logits.numpy(), group_tokens, num_groups)
    tokens = torch.from_numpy(groups).unsqueeze(-1) * group_tokens + torch.arange(group_tokens)
    rows = torch.cat([keys, values], -1).take_along_dim(tokens.flatten(1).unsqueeze(-1), 1)
    out, lse = attend_to(query, rows, torch.ones(rows.shape[:2], dtype=torch.bool))
    mean = values.float().mean(1)
    found = finish(out.numpy(), lse.numpy(), alpha, mean.numpy())
    return Partial(*map(torch.from_numpy, found))
