"""Sparse policies on heads of every width, groups of every size, ragged batches and many forks."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache as cached
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from offload import ConfigError, OffloadedCache
from offload.presets import Preset, customised
from offload.sparse.segments import SegmentSizes
from tests.support.generation import CHOICE_ERROR, decode, generate, padded_prompt, prompt
from tests.support.models import VOCAB_SIZE, make_model

SIZE, NUM_HEADS, WAIT_S = 16, 8, 60.0


@cached
def shaped_model(head_dim: int, group: int) -> PreTrainedModel:
    """Build a random model of two layers whose matrices have unit gain, as those of support."""
    torch.manual_seed(head_dim + group)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_HEADS // group,
            head_dim=head_dim,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=None,
        )
    )
    model.eval().requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def small(policy: str, budget: float | int) -> Preset:
    """Let a policy read sparsely in a context of a few hundred tokens."""
    preset = customised(policy, budget=budget, sink_tokens=4, window_tokens=32, dense_layers=0)
    assert preset.sparse is not None
    return replace(preset, sparse=replace(preset.sparse, sizes=SegmentSizes((256, 64))))


def sparse_cache(tmp_path: Path, policy: str, budget: float | int) -> OffloadedCache:
    return OffloadedCache(
        ["gpu", "cpu", "disk"],
        policy=small(policy, budget),
        capacity={"gpu": "2MiB", "cpu": "1MiB", "disk": "256MiB"},
        disk_path=tmp_path,
        chunk_tokens=SIZE,
    )


def check_close(found: list[Tensor], expected: list[Tensor], most: float = 1e-4) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < most


def check_everything_was_read(cache: OffloadedCache) -> None:
    stats = cache.stats()
    assert stats.retrieved_tokens == stats.covered_tokens > 0
    cache.check_integrity()


@torch.no_grad()
def answer(model: Any, cache: Cache) -> list[Tensor]:
    model(prompt(1, 600), past_key_values=cache)
    return list(decode(model, cache, prompt(1, 3, seed=4), steps=4).logits)


@pytest.mark.leaks
@pytest.mark.parametrize(
    ("head_dim", "group"),
    [
        (dim, group)
        for i, dim in enumerate((64, 80, 96, 128, 256))
        for group in ((1, 8), (2, 4))[i % 2]
    ],
)
def test_everything_read_gives_the_logits_of_dynamic_cache(
    head_dim: int, group: int, tmp_path: Path
) -> None:
    model = shaped_model(head_dim, group)
    with sparse_cache(tmp_path, "adaptive", 1.0) as cache:
        found = answer(model, cache)
        check_everything_was_read(cache)
    check_close(found, answer(model, DynamicCache()))


@pytest.mark.leaks
@pytest.mark.parametrize("lengths", [(600, 430), (256, 600, 599)], ids=str)
@pytest.mark.parametrize("policy", ["adaptive", "quest"])
def test_rows_of_different_lengths_give_the_logits_of_dynamic_cache(
    policy: str, lengths: tuple[int, ...], tmp_path: Path
) -> None:
    model, batch = make_model("llama"), padded_prompt(lengths)
    with sparse_cache(tmp_path, policy, 1.0) as cache:
        found = generate(model, cache, **batch)
        check_everything_was_read(cache)
    expected = generate(model, DynamicCache(), **batch)
    check_close(list(found.logits), list(expected.logits))


@pytest.mark.leaks
@pytest.mark.parametrize("policy", ["adaptive", "quest"])
def test_beams_give_the_tokens_of_dynamic_cache(policy: str, tmp_path: Path) -> None:
    model, ids = make_model("llama"), prompt(2, 600)
    with sparse_cache(tmp_path, policy, 1.0) as cache:
        found = generate(model, cache, input_ids=ids, num_beams=3)
        check_everything_was_read(cache)
    expected = generate(model, DynamicCache(), input_ids=ids, num_beams=3)
    assert torch.equal(found.tokens[0], expected.tokens[0])


@torch.no_grad()
def rearranged(model: Any, cache: Cache) -> list[Tensor]:
    """Decode three rows, then two of them in another order, then each of these twice."""
    model(prompt(3, 600), past_key_values=cache)
    logits = list(decode(model, cache, prompt(3, 2, seed=4), steps=2).logits)
    cache.batch_select_indices(torch.tensor([2, 0]))
    logits += decode(model, cache, prompt(2, 2, seed=5), steps=2).logits
    cache.batch_repeat_interleave(2)
    logits += decode(model, cache, prompt(4, 2, seed=6), steps=2).logits
    return logits


@pytest.mark.leaks
@pytest.mark.parametrize("policy", ["adaptive", "quest"])
def test_rows_that_are_selected_and_repeated_keep_their_own_tokens(
    policy: str, tmp_path: Path
) -> None:
    model = make_model("llama")
    with sparse_cache(tmp_path, policy, 1.0) as cache:
        found = rearranged(model, cache)
        check_everything_was_read(cache)
    check_close(found, rearranged(model, DynamicCache()))


@torch.no_grad()
def ask(model: Any, cache: OffloadedCache, number: int) -> list[Tensor]:
    """Decode a fork that goes on with a text of its own, of its own length."""
    fork = cache.fork()
    model(prompt(1, 70 * number + 1, seed=number), past_key_values=fork)
    logits = list(decode(model, fork, prompt(1, 2, seed=number), steps=6).logits)
    fork.close()
    return logits


@pytest.mark.leaks
@pytest.mark.parametrize("policy", ["adaptive", "retroinfer", "retrieval_attention", "quest"])
def test_forks_on_several_threads_give_the_logits_of_forks_in_turn(
    policy: str, tmp_path: Path
) -> None:
    model, num_forks = make_model("llama"), 4
    together = Barrier(num_forks)

    def ask_together(number: int) -> list[Tensor]:
        together.wait(WAIT_S)
        return ask(model, cache, number)

    with sparse_cache(tmp_path, policy, 24) as cache:
        with torch.no_grad():
            model(prompt(1, 900), past_key_values=cache)
        with ThreadPoolExecutor(num_forks) as pool:
            at_once = list(pool.map(ask_together, range(num_forks)))
        in_turn = [ask(model, cache, number) for number in range(num_forks)]
        assert 0 < cache.stats().retrieved_tokens < cache.stats().covered_tokens
        cache.check_integrity()
    for found, expected in zip(at_once, in_turn, strict=True):
        check_close(found, expected, CHOICE_ERROR)


@pytest.mark.leaks
@pytest.mark.parametrize("policy", ["adaptive", "quest"])
def test_keys_that_are_not_finite_are_refused_instead_of_searched(
    policy: str, tmp_path: Path
) -> None:
    model, bad_token = copy.deepcopy(shaped_model(64, 4)), 5
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    embedding.weight[bad_token] = torch.nan
    ids = prompt(1, 600)
    ids[ids == bad_token] = 6
    ids[0, 100] = bad_token
    with sparse_cache(tmp_path, policy, 24) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ConfigError, match=r"the key of token \d+, head 0 is not finite"):
            model(prompt(1, 1), past_key_values=cache)
