"""Which heads attend to sinks and window only, as DuoAttention found them for a model.

DuoAttention (arXiv 2410.10819) trains a gate per layer and KV head, near one where a head retrieves
from all of the context and near zero where it does not, and publishes the gates as files
``full_attention_heads.tsv``: one line per layer, one number per head. Here it decides what decoding
reads; prompts are read exactly by all heads.
"""

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from torch import Tensor

from offload.errors import ConfigError
from offload.sparse.plan import StreamingHeads

HeadPattern = Sequence[Sequence[bool]] | Tensor | str | PathLike[str]
"""Booleans by layer and head, or a file of gates."""


def read_head_pattern(
    path: str | PathLike[str], *, threshold: float = 0.5, sparsity: float | None = None
) -> StreamingHeads:
    """Read gates from a file and return which heads stream.

    Parameters
    ----------
    path : path
        Numbers separated by white space, a line per layer.
    threshold : float
        Heads whose gate is below it stream.
    sparsity : float, optional
        Instead: this share of all heads streams, those with the lowest gates.

    Raises
    ------
    ConfigError
        The file cannot be read, or is no table of numbers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a file without numbers
            gates = np.loadtxt(Path(path), ndmin=2)
    except (OSError, ValueError, UserWarning) as error:
        raise ConfigError(f"{path} is no table of gates: {error}") from error
    if not np.isfinite(gates).all():
        raise ConfigError(f"{path}: a gate is not finite")
    if sparsity is not None:
        if not 0 <= sparsity <= 1:
            raise ConfigError(f"sparsity={sparsity} is no share of the heads")
        order = gates.argsort(axis=None, kind="stable")
        streams = np.zeros(gates.size, dtype=bool)
        streams[order[: round(sparsity * gates.size)]] = True
        return as_streaming_heads(streams.reshape(gates.shape).tolist())
    return as_streaming_heads((gates < threshold).tolist())


def as_streaming_heads(pattern: HeadPattern) -> StreamingHeads:
    """Return a pattern given as booleans, as a tensor of them, or as a file of gates.

    Raises
    ------
    ConfigError
        It is no table of booleans.
    """
    if isinstance(pattern, str | PathLike):
        return read_head_pattern(pattern)
    rows = pattern.tolist() if isinstance(pattern, Tensor) else [list(row) for row in pattern]
    if not rows or not all(isinstance(row, list) and row for row in rows):
        raise ConfigError("streaming_heads is no table of layers and heads")
    if len({len(row) for row in rows}) > 1 or not all(type(x) is bool for row in rows for x in row):
        raise ConfigError("streaming_heads must hold a bool per layer and head, equally many each")
    return tuple(tuple(row) for row in rows)
