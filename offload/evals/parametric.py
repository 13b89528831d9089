"""Attention heads made from parameters: keys, values and queries as rotary language models have.

The content of a token is a low-rank mix of what it says (drawn from Zipf's law, so some repeat
often), what its topic is (256 tokens each) and itself; most of it lies in the dimensions that the
rotary embedding turns slowly. Keys and queries lie in different cones, so queries are unlike any
key, and the first key is a sink that every query sees. How sharp a head attends is its temperature:
24 is flat (it aggregates), 36 medium, 52 sharp (it retrieves).

A head is a function of its parameters alone: numpy's generator with a fixed order of draws.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

FLAT, MEDIUM, SHARP = 24.0, 36.0, 52.0

_Array = NDArray[np.float64]
_TOPIC_TOKENS, _NUM_TOPICS = 256, 64
_FIRST_TRAIN_POSITION = 64
_ROTARY_BASE = 5e5
_PIECE = 65536


@dataclass(frozen=True, slots=True)
class Shape:
    """Parameters of a head.

    Attributes
    ----------
    num_keys, head_dim : int
    num_queries : int
        Asked right after the last key, as decoding would.
    num_train_queries : int
        Asked at random positions inside the context, as a prefill would.
    rank : int
        Dimensions that the content of tokens spans.
    vocabulary : int
        Different tokens.
    temperature : float
    token_weight, topic_weight : float
        Of the token and of the topic of its passage in what a key holds.
    seed : int
    """

    num_keys: int = 16384
    head_dim: int = 128
    num_queries: int = 32
    num_train_queries: int = 64
    rank: int = 24
    vocabulary: int = 4000
    temperature: float = MEDIUM
    token_weight: float = 0.8
    topic_weight: float = 0.6
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Head:
    """What one head sees; logits are ``queries @ keys.T / sqrt(head_dim)``.

    Attributes
    ----------
    keys, values : Tensor, shape (num_keys, head_dim), float32
        Keys are rotated to their positions, from zero.
    queries : Tensor, shape (num_queries, head_dim), float32
    train_queries : Tensor, shape (num_train_queries, head_dim), float32
    train_positions : Tensor, int64 [num_train_queries]
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    train_queries: Tensor
    train_positions: Tensor


def make_head(shape: Shape) -> Head:
    """Return the head of these parameters."""
    rng = np.random.default_rng(shape.seed)
    content, basis = _content(rng, shape)
    key_cone, query_cone = _cones(rng, shape.head_dim)
    weight = 0.4 + _slow(shape.head_dim)
    keys = (content @ basis) * np.sqrt(shape.head_dim) * 0.35 * weight + key_cone
    _add_noise(keys, 0.15, rng)
    rotated = _rotated(keys)
    del keys
    rotated[0] = query_cone * 3 + 0.1 * rng.standard_normal(shape.head_dim)
    inside = np.arange(_FIRST_TRAIN_POSITION, shape.num_keys)
    train_positions = np.sort(rng.choice(inside, shape.num_train_queries, replace=False))

    def ask(positions: NDArray[np.int64]) -> _Array:
        """Return queries at positions, each for the content of a key before it."""
        target = np.array([rng.integers(0, max(1, position)) for position in positions])
        vague = 0.35 * rng.standard_normal((len(positions), shape.rank)) / np.sqrt(shape.rank) * 2
        noise = 0.3 * rng.standard_normal((len(positions), shape.head_dim))
        wanted: _Array = ((content[target] + vague) @ basis) * shape.temperature * weight
        return wanted + query_cone + noise

    train_queries = _rotate(ask(train_positions), train_positions)
    asked = np.full(shape.num_queries, shape.num_keys)
    queries = _rotate(ask(asked), asked + np.arange(shape.num_queries))
    values = content @ rng.standard_normal((shape.rank, shape.head_dim))
    _add_noise(values, 0.5, rng)
    return Head(
        keys=torch.from_numpy(rotated),
        values=torch.from_numpy(values.astype(np.float32)),
        queries=torch.from_numpy(queries.astype(np.float32)),
        train_queries=torch.from_numpy(train_queries.astype(np.float32)),
        train_positions=torch.from_numpy(train_positions),
    )


def _content(rng: Generator, shape: Shape) -> tuple[_Array, _Array]:
    """Return the content of each token, of length one, and the directions that it spans."""
    frequency = 1 / np.arange(1, shape.vocabulary + 1)
    frequency /= frequency.sum()
    of_token = rng.standard_normal((shape.vocabulary, shape.rank))
    of_topic = rng.standard_normal((_NUM_TOPICS, shape.rank))
    basis = np.linalg.qr(rng.standard_normal((shape.head_dim, shape.rank)))[0].T
    # Drawn for nothing: it keeps the stream, and with it published figures, as they were.
    rng.standard_normal((shape.rank, shape.rank))
    topics = rng.integers(0, _NUM_TOPICS, shape.num_keys // _TOPIC_TOKENS + 1)
    topic = np.repeat(topics, _TOPIC_TOKENS)[: shape.num_keys]
    token = rng.choice(shape.vocabulary, shape.num_keys, p=frequency)
    own = rng.standard_normal((shape.num_keys, shape.rank))
    content = shape.token_weight * of_token[token] + shape.topic_weight * of_topic[topic]
    content += 0.3 * own
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    return content, basis


def _cones(rng: Generator, dim: int) -> tuple[_Array, _Array]:
    """Return the means of keys and of queries, which point away from each other."""
    key = rng.standard_normal(dim)
    key *= 3 / np.linalg.norm(key)
    query = rng.standard_normal(dim)
    query -= (query @ key) / (key @ key) * key
    query *= 3 / np.linalg.norm(query)
    query -= 0.4 * key
    return key, query


def _slow(dim: int) -> _Array:
    """Return one for the slower half of the rotary dimensions, zero for the others."""
    slow = np.zeros(dim)
    slow[dim // 4 : dim // 2] = 1
    slow[3 * dim // 4 :] = 1
    return slow


def _add_noise(rows: _Array, scale: float, rng: Generator) -> None:
    # In pieces, of which the generator makes the same numbers as of the whole.
    for start in range(0, len(rows), _PIECE):
        piece = rows[start : start + _PIECE]
        piece += scale * rng.standard_normal(piece.shape)


def _rotated(keys: _Array) -> NDArray[np.float32]:
    """Rotate keys to their positions, in pieces: a million of them take gigabytes as it is."""
    rotated = np.empty(keys.shape, np.float32)
    for start in range(0, len(keys), _PIECE):
        piece = keys[start : start + _PIECE]
        rotated[start : start + _PIECE] = _rotate(piece, np.arange(start, start + len(piece)))
    return rotated


def _rotate(rows: _Array, positions: NDArray[np.int64]) -> _Array:
    """Apply the rotary embedding, in halves."""
    dim = rows.shape[1]
    angle = positions[:, None] * _ROTARY_BASE ** (-np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angle), np.sin(angle)
    left, right = rows[:, : dim // 2], rows[:, dim // 2 :]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], 1)
