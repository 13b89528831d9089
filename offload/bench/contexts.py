"""Synthetic contexts: keys, values and the queries of successive steps, made in seconds.

One set of keys and values serves all layers and rows, since every cache keeps its own copies of
them anyway; every layer, row and head asks queries of its own.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from offload.bench.shapes import ModelShape
from offload.evals.parametric import FLAT, MEDIUM, SHARP, Shape, make_head

ContextKind = Literal["parametric", "topics", "gaussian"]

_TEMPERATURES = (FLAT, MEDIUM, SHARP)
_POOL_QUERIES = 512
_WEIGHTS = {"parametric": (0.8, 0.6), "topics": (0.3, 1.0)}
"""Of the token and of the topic."""
_Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Context:
    """What caches are filled with, and what is then asked step by step.

    Attributes
    ----------
    keys, values : Tensor, shape (num_kv_heads, num_tokens + num_steps, head_dim)
        The last ``num_steps`` tokens are those that the steps append.
    queries : Tensor, shape (num_steps, num_layers, batch, num_heads, head_dim)
    num_tokens : int
    query_cosine : float
        Mean cosine of the queries of successive steps.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    num_tokens: int
    query_cosine: float

    @property
    def num_steps(self) -> int:
        """How many steps there are queries for."""
        return self.queries.shape[0]


def make_context(
    shape: ModelShape,
    num_tokens: int,
    num_steps: int,
    *,
    num_layers: int = 1,
    batch: int = 1,
    kind: ContextKind = "parametric",
    correlation: float = 0.9,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Context:
    """Make a context on the CPU.

    Parameters
    ----------
    shape : ModelShape
    num_tokens, num_steps : int
    num_layers, batch : int
        That ask queries of their own.
    kind : {"parametric", "topics", "gaussian"}
        Heads as language models have them, flat, medium and sharp in turn; the same with keys that
        are more of their passage than of their token, so that what matters lies together; or normal
        numbers.
    correlation : float
        From 0 to 1: of the queries of successive steps, about their mean; ``correlation ** n``
        after ``n`` steps. 0: independent.
    dtype : torch.dtype
    seed : int
    """
    rng = np.random.default_rng(seed)
    total = num_tokens + num_steps
    size = (shape.num_kv_heads, total, shape.head_dim)
    keys, values = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
    group = shape.num_heads // shape.num_kv_heads
    count = num_layers * batch * group
    queries = torch.empty(num_steps, num_layers, batch, shape.num_heads, shape.head_dim)
    pools = _pools(kind, shape.head_dim, total, seed)
    for head in range(shape.num_kv_heads):
        pool = pools[head % len(pools)]
        channels, signs = _relabelling(rng, shape.head_dim)
        keys[head] = pool.keys[:, channels].mul_(signs)
        values[head] = pool.values[:, channels].mul_(signs)
        asked = _trajectories(pool.queries, num_steps, count, correlation, rng)
        mine = torch.from_numpy(asked)[..., channels].mul_(signs)
        heads = slice(head * group, (head + 1) * group)
        queries[:, :, :, heads] = mine.view(num_steps, num_layers, batch, group, -1)
    cosine = float(cosine_similarity(queries[1:], queries[:-1], dim=-1).mean())
    return Context(keys, values, queries.to(dtype), num_tokens, cosine)


@dataclass(frozen=True, slots=True)
class _Pool:
    """One head: keys, values, and independent queries of it."""

    keys: Tensor
    values: Tensor
    queries: _Array


def _pools(kind: ContextKind, dim: int, num_keys: int, seed: int) -> list[_Pool]:
    if kind == "gaussian":
        generator = torch.Generator().manual_seed(seed)
        drawn = (
            torch.randn(count, dim, generator=generator)
            for count in (num_keys, num_keys, _POOL_QUERIES)
        )
        keys, values, queries = drawn
        return [_Pool(keys, values, queries.numpy())]
    token_weight, topic_weight = _WEIGHTS[kind]
    heads = (
        make_head(
            Shape(
                num_keys,
                dim,
                num_queries=_POOL_QUERIES,
                num_train_queries=1,
                temperature=temperature,
                token_weight=token_weight,
                topic_weight=topic_weight,
                seed=seed + number,
            )
        )
        for number, temperature in enumerate(_TEMPERATURES)
    )
    return [_Pool(head.keys, head.values, head.queries.numpy()) for head in heads]


def _relabelling(rng: Generator, dim: int) -> tuple[Tensor, Tensor]:
    """Return an order and signs of channels.

    Heads that differ by them are as hard for every index, whether it looks at single channels or at
    whole vectors, and have other numbers.
    """
    channels = torch.from_numpy(rng.permutation(dim))
    return channels, torch.from_numpy(rng.choice(np.array([-1, 1], np.float32), dim))


def _trajectories(
    pool: _Array, num_steps: int, count: int, correlation: float, rng: Generator
) -> _Array:
    """Let ``count`` queries wander; return ``[num_steps, count, dim]``.

    A query keeps what it looks for with probability ``sqrt(correlation)``, else it jumps to another
    one of the pool, and at every step drifts by as much as leaves ``sqrt(correlation)`` of it. A
    plain AR(1) of the whole query would be an average of many things looked for, and every head
    would be flat.
    """
    kept = correlation**0.5
    mean = pool.mean(0)
    around = pool - mean
    found = np.empty((num_steps, count, pool.shape[1]), np.float32)
    target = rng.integers(0, len(pool), count)
    for step in range(num_steps):
        jumps = rng.random(count) >= kept
        target = np.where(jumps, rng.integers(0, len(pool), count), target)
        drift = around[rng.integers(0, len(pool), count)]
        found[step] = mean + kept**0.5 * around[target] + (1 - kept) ** 0.5 * drift
    return found
