"""A tiny Llama, and ``OffloadedCache`` objects so small that it uses all their tiers."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from offload import (
    OffloadedCache,
)

CHUNK_TOKENS = 8
SLOT_BYTES = 4096
CAPACITY = {"gpu": 14 * SLOT_BYTES, "cpu": 3 * SLOT_BYTES, "disk": 400 * SLOT_BYTES}


@functools.cache
def make_llama(**changes: Any) -> Any:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=None,
        **changes,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def draw_ids(batch: int, num_tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (batch, num_tokens), generator=generator)


def make_cache(tmp_path: Path, **changes: Any) -> OffloadedCache:
    arguments: dict[str, Any] = {
        "tiers": ["gpu", "cpu", "disk"],
        "capacity": CAPACITY,
        "disk_path": tmp_path / "disk",
        "chunk_tokens": CHUNK_TOKENS,
    }
    return OffloadedCache(**{**arguments, **changes})


@torch.no_grad()
def step(cache: Cache, ids: Tensor) -> Tensor:
    """Run the model over new tokens; return the logits of the last one."""
    logits: Tensor = make_llama()(ids, past_key_values=cache).logits
    return logits[:, -1]


def decode(cache: Cache, ids: Tensor) -> None:
    """Feed tokens one at a time."""
    for token in ids.split(1, 1):
        step(cache, token)


def generate(cache: Cache, ids: Tensor, num_new: int = 12) -> Tensor:
    tokens: Tensor = make_llama().generate(
        ids, past_key_values=cache, max_new_tokens=num_new, do_sample=False
    )
    return tokens


def expected_tokens(ids: Tensor, num_new: int = 12) -> Tensor:
    return generate(DynamicCache(), ids, num_new)


def check_continues(cache: Cache, plain: Cache, num_new: int = 12) -> None:
    """Decode greedily with both; the tokens must be the same."""
    assert cache.get_seq_length() == plain.get_seq_length()
    batch = cache.batch_size
    tokens = other = torch.full((batch, 1), 5)
    for _ in range(num_new):
        tokens, other = (
            step(each, ids).argmax(-1, keepdim=True)
            for each, ids in ((cache, tokens), (plain, other))
        )
        assert torch.equal(tokens, other)


def plain_after(*pieces: Tensor) -> DynamicCache:
    """Return transformers' own cache after the same tokens."""
    plain = DynamicCache()
    for piece in pieces:
        step(plain, piece)
    return plain


def check_sound(cache: OffloadedCache, num_tokens: int) -> None:
    """Every layer has the same length, and the books balance."""
    assert {cache.get_seq_length(layer) for layer in range(2)} == {num_tokens}
    cache.check_integrity()


def check_nothing_left(folder: Path) -> None:
    assert [path for path in folder.iterdir() if path.is_dir()] == []
