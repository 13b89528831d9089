"""Shapes of real models, so that random weights and synthetic contexts cost what theirs would."""

from dataclasses import dataclass
from typing import Literal

import torch

from offload.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The layers of a model.

    Attributes
    ----------
    name : str
    family : {"llama", "qwen3"}
    num_heads, num_kv_heads, head_dim : int
    hidden_size, intermediate_size : int
    """

    name: str
    family: Literal["llama", "qwen3"]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the key and value of one token and KV head."""
        return 2 * self.head_dim * dtype.itemsize

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of all keys and values of one token in one layer."""
        return self.num_kv_heads * self.row_bytes(dtype)


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("llama-3.1-8b", "llama", 32, 8, 128, 4096, 14336),
        ModelShape("qwen3-8b", "qwen3", 32, 8, 128, 4096, 12288),
        ModelShape("tiny", "llama", 4, 2, 64, 128, 128),
    )
}
"""By name; ``tiny`` is for trying out a command, and for tests."""

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")
}


def find_shape(name: str) -> ModelShape:
    """Return a shape by name; raise ConfigError naming those that exist."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[name]
