"""An ``OffloadedCache`` under a real model when something fails: undone, named, usable again."""

import copy
import errno
import functools
import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from offload import (
    CapacityError,
    ClosedError,
    ConfigError,
    CorruptChunk,
    DiskFull,
    OffloadedCache,
    StorageError,
    TransferTimeout,
)
from offload.tiers.disk import DiskTier
from tests.support.disk import WAIT_S, FlakyCall, Gate, fail_with

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


def break_disk(patch: pytest.MonkeyPatch, **calls: Any) -> None:
    """Give the disk tiers of caches made from now on other system calls."""
    patch.setattr("offload.engine.DiskTier", functools.partial(DiskTier, **calls))


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


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


def test_generate_beyond_every_capacity_names_bytes_and_goes_on_when_there_is_room(
    tmp_path: Path,
) -> None:
    capacity = {"gpu": 14 * SLOT_BYTES, "cpu": 3 * SLOT_BYTES, "disk": 8 * SLOT_BYTES}
    ids = draw_ids(1, 24)
    with make_cache(tmp_path, capacity=capacity) as cache:
        step(cache, ids)
        with pytest.raises(CapacityError, match=rf"chunks of {SLOT_BYTES} bytes"):
            step(cache, draw_ids(1, 200, seed=2))
        check_sound(cache, 24)
        check_continues(cache, plain_after(ids))
        check_sound(cache, 24 + 12)


def test_decoding_until_the_tiers_are_full_keeps_every_layer_at_the_same_length(
    tmp_path: Path,
) -> None:
    capacity = {"gpu": 13 * SLOT_BYTES, "cpu": 3 * SLOT_BYTES, "disk": 4 * SLOT_BYTES}
    ids = draw_ids(1, 200)
    with make_cache(tmp_path, capacity=capacity) as cache:
        with pytest.raises(CapacityError):
            decode(cache, ids)
        reached = cache.get_seq_length()
        assert reached >= 3 * CHUNK_TOKENS
        check_sound(cache, reached)
        cache.crop(-CHUNK_TOKENS - 3)
        check_continues(cache, plain_after(ids[:, : reached - CHUNK_TOKENS - 3]), num_new=4)


def test_first_prompt_that_does_not_fit_leaves_the_cache_free_for_another_batch(
    tmp_path: Path,
) -> None:
    capacity = {"gpu": 60 * SLOT_BYTES, "cpu": 3 * SLOT_BYTES, "disk": 8 * SLOT_BYTES}
    with make_cache(tmp_path, capacity=capacity) as cache:
        with pytest.raises(CapacityError):
            step(cache, draw_ids(4, 200))
        ids = draw_ids(2, 16)
        assert torch.equal(generate(cache, ids), expected_tokens(ids))


def test_device_too_small_for_one_layer_names_both_numbers(tmp_path: Path) -> None:
    capacity = {**CAPACITY, "gpu": 2 * SLOT_BYTES}
    with make_cache(tmp_path, capacity=capacity) as cache:
        with pytest.raises(CapacityError, match=r"gpu capacity 8192 bytes.* make \d+"):
            step(cache, draw_ids(1, 8))
        assert cache.get_seq_length() == 0
    check_nothing_left(tmp_path / "disk")


@pytest.mark.parametrize(
    ("code", "error"), [(errno.ENOSPC, DiskFull), (errno.EIO, StorageError)], ids=["full", "broken"]
)
def test_disk_that_refuses_writes_raises_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[StorageError]
) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(code), armed=False)
    break_disk(monkeypatch, pwritev=pwritev)
    ids = draw_ids(2, 40)
    with make_cache(tmp_path) as cache:
        step(cache, ids)
        cache.flush()
        pwritev.armed = True
        with pytest.raises(error) as caught:
            step(cache, draw_ids(2, 60, seed=2))
        assert caught.value.errno == code
        check_sound(cache, 40)
        pwritev.armed = False
        check_continues(cache, plain_after(ids))
    check_nothing_left(tmp_path / "disk")


def damage(folder: Path, how: str) -> None:
    """Change every record on disk, or cut every file."""
    paths = list(folder.rglob("*.kvseg"))
    assert paths
    for path in paths:
        size = path.stat().st_size
        with path.open("r+b") as file:
            if how == "truncated":
                file.truncate(size // 2)
                continue
            for offset in range(4096, size, 2 * SLOT_BYTES):
                file.seek(offset)
                file.write(bytes(byte ^ 0x10 for byte in os.pread(file.fileno(), 1, offset)))


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_damaged_record_raises_in_the_next_step_and_the_step_is_undone(
    tmp_path: Path, how: str
) -> None:
    ids = draw_ids(1, 90)
    with make_cache(tmp_path) as cache:
        step(cache, ids)
        cache.flush()
        damage(tmp_path / "disk", how)
        with pytest.raises(CorruptChunk):
            decode(cache, draw_ids(1, 3, seed=2))  # what was loaded ahead lasts for a step
        length = cache.get_seq_length()
        assert 90 <= length < 93
        check_sound(cache, length)
        with pytest.raises(CorruptChunk):
            step(cache, draw_ids(1, 1, seed=3))
        check_sound(cache, length)
        cache.reset()
        assert torch.equal(generate(cache, ids), expected_tokens(ids))
    check_nothing_left(tmp_path / "disk")


def test_disk_that_hangs_makes_a_step_miss_its_deadline_and_is_forgiven_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    preadv = FlakyCall(os.preadv, gate, armed=False)
    break_disk(monkeypatch, preadv=preadv)
    ids, more = draw_ids(1, 90), draw_ids(1, 3, seed=2)
    with make_cache(tmp_path) as cache:
        cache._core.config = replace(cache._core.config, deadline_s=0.5)
        step(cache, ids)
        cache.flush()
        preadv.armed = True
        with pytest.raises(TransferTimeout, match=r"load of \d+ chunks of layer \d from token \d+"):
            decode(cache, more)  # what was loaded ahead lasts for a step
        length = cache.get_seq_length()
        check_sound(cache, length)
        gate.open()
        preadv.armed = False
        check_continues(cache, plain_after(torch.cat([ids, more[:, : length - 90]], 1)), num_new=3)


@pytest.mark.parametrize(
    ("shape", "dtype", "named"),
    [
        ((1, 2, 1, 8), torch.float64, "torch.float64"),
        ((3, 2, 1, 8), torch.float32, r"\(3, 2, 8, 8\)"),
        ((1, 4, 1, 8), torch.float32, r"\(1, 4, 8, 8\)"),
        ((1, 2, 1, 16), torch.float32, r"\(1, 2, 16, 16\)"),
    ],
    ids=["dtype", "batch", "heads", "head_dim"],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_states_that_do_not_continue_the_cache_are_refused(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, named: str, layer: int
) -> None:
    ids = draw_ids(1, 30)
    with make_cache(tmp_path) as cache:
        step(cache, ids)
        with pytest.raises(ConfigError, match=f"layer {layer} got .*{named}"):
            cache.update(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), layer)
        check_sound(cache, 30)
        check_continues(cache, plain_after(ids))


def test_use_after_close_raises_closed_error_and_close_twice_is_fine(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    step(cache, draw_ids(1, 60))
    cache.close()
    cache.close()
    check_nothing_left(tmp_path / "disk")
    with pytest.raises(ClosedError, match="closed"):
        step(cache, draw_ids(1, 1))
    with pytest.raises(ClosedError):
        cache.reset()
    with pytest.raises(ClosedError):
        copy.deepcopy(cache)
    assert "OffloadedCache" in repr(cache)


def test_unused_cache_leaves_nothing_behind(tmp_path: Path) -> None:
    make_cache(tmp_path).close()
    check_nothing_left(tmp_path / "disk")


def test_cache_that_nobody_refers_to_is_closed(tmp_path: Path) -> None:
    # That threads and descriptors are gone as well is checked around every test of this folder.
    cache = make_cache(tmp_path)
    step(cache, draw_ids(1, 60))
    del cache
    gc.collect()
    check_nothing_left(tmp_path / "disk")


def test_interrupted_step_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = draw_ids(1, 40)
    with make_cache(tmp_path) as cache:
        step(cache, ids)
        with monkeypatch.context() as patch:
            attend = cache._core.runtime.attend  # type: ignore[union-attr]

            def interrupt(layer: int, *args: Any) -> Tensor:
                if layer == 1:
                    raise KeyboardInterrupt
                return attend(layer, *args)

            patch.setattr(cache._core.runtime, "attend", interrupt)
            with pytest.raises(KeyboardInterrupt):
                step(cache, draw_ids(1, 1))
        check_sound(cache, 40)
        check_continues(cache, plain_after(ids))


def test_two_caches_on_two_threads_give_the_tokens_they_give_alone(tmp_path: Path) -> None:
    prompts = [draw_ids(2, 50, seed=5), draw_ids(1, 70, seed=6)]
    with (
        ThreadPoolExecutor(2) as executor,
        make_cache(tmp_path) as first,
        make_cache(tmp_path) as second,
    ):
        running = [
            executor.submit(generate, cache, ids)
            for cache, ids in zip([first, second], prompts, strict=True)
        ]
        found = [future.result(WAIT_S) for future in running]
    for tokens, ids in zip(found, prompts, strict=True):
        assert torch.equal(tokens, expected_tokens(ids))


def test_forks_on_two_threads_go_their_own_ways(tmp_path: Path) -> None:
    shared, capacity = draw_ids(1, 50), {**CAPACITY, "gpu": 24 * SLOT_BYTES}
    endings = [draw_ids(1, 9, seed=7), draw_ids(1, 20, seed=8)]
    prompts = [torch.cat([shared, ending], 1) for ending in endings]
    with make_cache(tmp_path, capacity=capacity) as cache:
        step(cache, shared)
        with copy.deepcopy(cache) as fork, ThreadPoolExecutor(2) as executor:
            running = [
                executor.submit(generate, branch, ids)
                for branch, ids in zip([cache, fork], prompts, strict=True)
            ]
            found = [future.result(WAIT_S) for future in running]
        check_sound(cache, prompts[0].shape[1] + 11)
    for tokens, ids in zip(found, prompts, strict=True):
        assert torch.equal(tokens, expected_tokens(ids))
    check_nothing_left(tmp_path / "disk")


@pytest.mark.parametrize("first", [0, 1])
def test_fork_survives_the_other_one(tmp_path: Path, first: int) -> None:
    ids, capacity = draw_ids(1, 50), {**CAPACITY, "gpu": 24 * SLOT_BYTES}
    cache = make_cache(tmp_path, capacity=capacity)
    step(cache, ids)
    branches = [cache, copy.deepcopy(cache)]
    branches.pop(first).close()
    with branches[0] as left:
        check_continues(left, plain_after(ids))
    check_nothing_left(tmp_path / "disk")


def test_output_attentions_is_refused(tmp_path: Path) -> None:
    with make_cache(tmp_path) as cache, pytest.raises(ConfigError, match="output_attentions"):
        make_llama()(draw_ids(1, 8), past_key_values=cache, output_attentions=True)


def test_attention_dropout_in_training_mode_is_refused(tmp_path: Path) -> None:
    model = make_llama(attention_dropout=0.1)
    model.train()
    with make_cache(tmp_path) as cache, pytest.raises(ConfigError, match=r"dropout 0\.1 .*eval"):
        model(draw_ids(1, 8), past_key_values=cache)


def test_forward_that_records_gradients_gives_the_logits_of_dynamic_cache(tmp_path: Path) -> None:
    ids, plain = draw_ids(1, 60), DynamicCache()
    model = make_llama()
    with make_cache(tmp_path) as cache:
        for piece in (ids[:, :37], ids[:, 37:38], ids[:, 38:]):
            found = model(piece, past_key_values=cache).logits
            expected = model(piece, past_key_values=plain).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
