"""The parts of ``kernels.sparf`` in plain numpy and torch: what the compiled ones are to find.

Parameters and results are those of ``kernels.sparf``, but where said otherwise.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Codes = NDArray[np.int8]
Floats = NDArray[np.float32]
Places = NDArray[np.int64]

LEAST_PEAK = 2.0**-100
"""Channels that stay below are taken to be zero: their codes would need a factor near overflow."""

_LARGEST = np.finfo(np.float32).max


def encode_channels(keys: Tensor) -> tuple[Codes, Floats]:
    """Return codes and scales of keys."""
    wide = keys.float().mT
    size = wide.abs()
    peak = torch.where(size.isfinite(), size, 0).amax(-1)
    peak = torch.where(peak >= LEAST_PEAK, peak, 0)
    # Not ``127 / peak``, which torch computes as a product with the reciprocal.
    inverse = torch.where(peak > 0, torch.full_like(peak, 127) / peak, 0)
    numbers = (wide * inverse.unsqueeze(-1)).nan_to_num(nan=0).clamp(-127, 127).round()
    return numbers.to(torch.int8).numpy(), (peak / 127).numpy()


def join_codes(parts: Sequence[Codes], part_scales: Floats) -> tuple[Codes, Floats]:
    """Return codes and scales of all parts.

    Parameters
    ----------
    parts : sequence of int8 [num_heads, dim, length]
    part_scales : float32 [num_parts, num_heads, dim]
    """
    scales = part_scales.max(0)
    ratios = part_scales / np.where(scales > 0, scales, 1)
    rounded = [
        np.rint(codes * ratio[..., None]).astype(np.int8)
        for codes, ratio in zip(parts, ratios, strict=True)
    ]
    return np.concatenate(rounded, 2), scales


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
    """Return logits from some channels."""
    asked = np.take_along_axis(query, channels[:, None], 2) / np.sqrt(coverage)[..., None]
    logits = np.empty((*query.shape[:2], len(block), piece_tokens), np.float32)
    for piece, (own, place) in enumerate(zip(block, column, strict=True)):
        runs = (addresses[own] + place * piece_tokens).ravel().tolist()
        codes = b"".join(ctypes.string_at(run, piece_tokens) for run in runs)
        keys = np.frombuffer(codes, np.int8).reshape(*channels.shape, piece_tokens)
        logits[:, :, piece] = asked @ (keys * scales[own, :, :, None])
    return logits.reshape(*query.shape[:2], -1)


def choose_groups(logits: Floats, group_tokens: int, num_chosen: int) -> tuple[Places, Floats]:
    """Return the groups with most of the softmax, and what each query has there.

    Returns
    -------
    groups : int64 [num_heads, num_chosen]
    shares : float32 [num_heads, num_queries, num_chosen]
        Of the softmax of each query; of a constant one if all logits are ``-inf``.
    """
    finite = np.where(np.isnan(logits), -np.inf, np.minimum(logits, _LARGEST))
    peak = np.maximum(finite.max(-1, keepdims=True), -_LARGEST)
    weights = np.exp(finite - peak).reshape(*logits.shape[:2], -1, group_tokens).sum(-1)
    total = weights.sum(-1, keepdims=True)
    shares = np.where(total > 0, weights / np.where(total > 0, total, 1), 1 / weights.shape[-1])
    groups = np.sort(np.argsort(-shares.sum(1), -1, kind="stable")[:, :num_chosen], -1)
    return groups, np.take_along_axis(shares, groups[:, None], 2).astype(np.float32)
