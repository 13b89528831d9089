"""Sessions of a tiny real model, and what it has to say when one is loaded."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from offload import OffloadedCache
from offload.sessions.store import SessionStore
from tests.support.small_caches import CAPACITY, draw_ids, generate, make_cache, make_llama

_PROMPT_TOKENS = 60
_NUM_NEW = 6


def save_model_session(store: SessionStore, name: str, seed: int, scratch: Path) -> None:
    """Run the model on a prompt, and save the cache."""
    ids = draw_ids(1, _PROMPT_TOKENS, seed)
    with make_cache(scratch) as cache:
        tokens = generate(cache, ids, _NUM_NEW)
        cache.save(name, store=store, model=make_llama(), token_ids=tokens)


def assert_model_continues(store: SessionStore, name: str, seed: int, scratch: Path) -> None:
    """Load a session, generate, and compare with a cache that was never saved."""
    with OffloadedCache.load(
        name, make_llama(), store=store, capacity=CAPACITY, disk_path=scratch / "disk"
    ) as cache:
        assert torch.equal(_second_turn(cache, seed), _second_turn(None, seed))


def _second_turn(cache: OffloadedCache | None, seed: int) -> Tensor:
    ids, plain = draw_ids(1, _PROMPT_TOKENS, seed), DynamicCache()
    tokens = generate(plain, ids, _NUM_NEW)
    more = torch.cat([tokens, draw_ids(1, 5, seed + 1)], 1)
    return generate(plain if cache is None else cache, more, _NUM_NEW)
