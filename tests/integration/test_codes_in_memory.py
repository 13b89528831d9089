"""Caches whose host tier holds codes: attention on them, and all that happens to chunks."""

import functools
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from offload import CapacityError, ConfigError, OffloadedCache, SessionStore
from offload.core import CacheCore
from offload.exact import AttentionCall
from offload.kernels.reference import partial_attention
from offload.recall_data import build_document
from offload.recall_model import load_recall_model
from offload.runtime import Runtime
from offload.settings import check_settings
from offload.tiers.codec_fixed import FIXED
from offload.tiers.coded import CodedTier
from tests.support.generation import decode, generate, padded_prompt, prompt
from tests.support.leoam_sessions import in_short_segments
from tests.support.models import make_model
from tools.recall_eval import answers, far_facts

TIERS = ("gpu", "cpu", "disk")
SIZE = 16
SLOT = 4096
"""Bytes of a chunk of the tiny models as it is; its codes take 640 to 1,280."""

every_codec = pytest.mark.parametrize("name", FIXED)


def open_cache(
    scratch: Path,
    codec: str | dict[str, str],
    cpu_slots: int = 12,
    tiers: tuple[str, ...] = TIERS,
    **changes: Any,
) -> OffloadedCache:
    sizes = {"gpu": 20 * SLOT, "cpu": cpu_slots * SLOT, "disk": 4096 * SLOT}
    where: dict[str, Any] = {"disk_path": scratch} if "disk" in tiers else {}
    capacity = {tier: sizes[tier] for tier in tiers}
    return OffloadedCache(
        tiers, codec=codec, **{**where, "capacity": capacity, "chunk_tokens": SIZE, **changes}
    )


def runtime_of(cache: OffloadedCache) -> Runtime:
    assert cache._core.runtime is not None
    return cache._core.runtime


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_used(cache: OffloadedCache) -> None:
    """Codes are held, nothing is over its capacity, and books agree."""
    host = cache.stats().tiers["cpu"]
    assert host.num_chunks > 0
    assert host.codec in FIXED
    assert host.ratio > 1.5
    assert host.num_tokens <= host.max_tokens
    cache.check_integrity()


# Attention, of any mix of tiers, against what is read back from them.


def open_core(scratch: Path, codec: dict[str, str], cpu_slots: int) -> CacheCore:
    sizes = {"gpu": 12 * SLOT, "cpu": cpu_slots * SLOT, "disk": 4096 * SLOT}
    return CacheCore(check_settings(TIERS, "exact", sizes, scratch, SIZE, codec))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cpu_slots", [5, 6, 40], ids=["mostly disk", "all three", "no disk"])
@pytest.mark.parametrize("hidden", ["nothing", "padding", "window"])
@every_codec
def test_any_mix_of_tiers_is_attended_as_what_is_read_back_from_them(
    name: str, hidden: str, cpu_slots: int, tmp_path: Path
) -> None:
    with closing(open_core(tmp_path, {"cpu": name, "disk": "kivi2"}, cpu_slots)) as core:
        check_mix(core, hidden)
        num_chunks = [tier.num_chunks for tier in core.stats().tiers.values()]
    assert num_chunks[0] > 0
    assert num_chunks[1] > 0
    assert (num_chunks[2] > 0) == (cpu_slots < 40)


def check_mix(core: CacheCore, hidden: str) -> None:
    batch, heads, kv_heads, dim, length = 2, 8, 2, 16, 15 * SIZE + 5
    keys, values = (draw(batch, kv_heads, length + 1, dim, seed=seed) for seed in (1, 2))
    query = draw(batch, heads, 1, dim, seed=3)
    mask = torch.ones(batch, length + 1, dtype=torch.bool)
    mask[1, :21] = hidden != "padding"
    call = AttentionCall(
        query,
        0.25,
        mask if hidden == "padding" else None,
        window=11 * SIZE + 3 if hidden == "window" else None,
    )
    core.append(0, keys[:, :, :length], values[:, :, :length])
    appended = core.append(0, keys[:, :, length:], values[:, :, length:])
    core.flush()
    # First, because a chunk that was read from the disk may become codes of the host.
    held_keys, held_values = core.read_layer(0)
    found = core.attend(0, call, appended)
    bias = torch.zeros(batch, 1, 1, length + 1).masked_fill(~mask[:, None, None], -torch.inf)
    expected = partial_attention(
        query,
        held_keys.unsqueeze(1),
        held_values.unsqueeze(1),
        scale=0.25,
        bias=bias if hidden == "padding" else None,
        offset=length,
        window=call.window,
    )
    torch.testing.assert_close(found, expected.out.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert 0 < error(held_keys, keys) < 0.5


# Models.


@pytest.mark.parametrize("model_name", ["llama", "gemma2", "deepseek_v3", "gpt_oss"])
@every_codec
def test_generate_stays_close_to_raw_chunks(model_name: str, name: str, tmp_path: Path) -> None:
    model = make_model(model_name, "eager")
    ids = prompt(1, 300)
    outcomes = {}
    for codec in ("raw", name):
        with open_cache(tmp_path, {"cpu": codec}, 24) as cache:
            outcomes[codec] = generate(model, cache, input_ids=ids)
            assert cache.stats().num_tokens == 305
            if codec != "raw":
                check_used(cache)
    assert outcomes[name].tokens[0].shape == (1, 306)
    largest = {"int8": 0.05, "fp8": 0.2, "kivi4": 0.5, "kivi2": 1.0}[name]
    assert 0 < error(outcomes[name].logits[1], outcomes["raw"].logits[1]) < largest


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
def test_beams_and_samples_share_codes(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = make_model("llama")
    more = {"do_sample": "num_return_sequences" in arguments, **arguments}
    stock = generate(model, DynamicCache(), input_ids=prompt(1, 200), **more)
    with open_cache(tmp_path, {"cpu": "int8"}, 30) as cache:
        found = generate(model, cache, input_ids=prompt(1, 200), **more)
        check_used(cache)
    assert torch.equal(found.tokens[0], stock.tokens[0])


def test_padded_rows_read_codes_of_their_own_length(tmp_path: Path) -> None:
    model, batch = make_model("llama"), padded_prompt([150, 211])
    stock = generate(model, DynamicCache(), **batch)
    with open_cache(tmp_path, {"cpu": "int8"}, 30) as cache:
        found = generate(model, cache, **batch)
        check_used(cache)
    assert torch.equal(found.tokens[0], stock.tokens[0])


@pytest.mark.leaks
@pytest.mark.parametrize("codec", [{"cpu": "kivi4"}, {"cpu": "fp8", "disk": "fp8"}], ids=str)
def test_forks_go_on_alike(codec: dict[str, str], tmp_path: Path) -> None:
    model = make_model("llama")
    with open_cache(tmp_path, codec, 30) as cache:
        generate(model, cache, input_ids=prompt(1, 200))
        check_used(cache)
        with cache.fork() as fork:
            first, second = (decode(model, each, prompt(1, 3)) for each in (cache, fork))
        assert torch.equal(first.tokens[0], second.tokens[0])
        torch.testing.assert_close(torch.cat([*first.logits]), torch.cat([*second.logits]))


@pytest.mark.parametrize("num_tokens", [5 * SIZE, 5 * SIZE + 7, 1])
def test_cropped_cache_goes_on_from_what_codes_decode_to(num_tokens: int, tmp_path: Path) -> None:
    model = make_model("llama")
    with open_cache(tmp_path, {"cpu": "int8"}, 30) as cache, torch.no_grad():
        model(prompt(1, 200), past_key_values=cache)
        kept = runtime_of(cache).read_layer(0)[0][:, :, :num_tokens].clone()
        cache.crop(num_tokens - 200)
        assert cache.get_seq_length() == num_tokens
        assert torch.equal(runtime_of(cache).read_layer(0)[0], kept)
        decode(model, cache, prompt(1, 40))
        cache.check_integrity()


@pytest.mark.parametrize("loaded_as", ["raw", "kivi4"])
def test_saved_session_holds_what_codes_decode_to(loaded_as: str, tmp_path: Path) -> None:
    model = make_model("llama")
    with SessionStore(tmp_path / "root", quota="64MiB", min_free=0) as store:
        with open_cache(tmp_path, {"cpu": "kivi4"}, 30) as cache:
            generate(model, cache, input_ids=prompt(1, 200))
            check_used(cache)
            cache.save("chat", store=store, model=model)
            held = runtime_of(cache).read_layer(1)
            expected = decode(model, cache, prompt(1, 3))
        sizes = {"gpu": 20 * SLOT, "cpu": 30 * SLOT, "disk": 4096 * SLOT}
        with OffloadedCache.load(
            "chat",
            model,
            store=store,
            codec={"cpu": loaded_as},
            capacity=sizes,
            disk_path=tmp_path / "scratch",
        ) as loaded:
            again = runtime_of(loaded).read_layer(1)
            assert all(torch.equal(a, b) for a, b in zip(again, held, strict=True))
            found = decode(model, loaded, prompt(1, 3))
            loaded.check_integrity()
        assert torch.equal(found.tokens[0], expected.tokens[0])
        assert store.fsck().is_clean


@functools.cache
def recall_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_recall_model()


@pytest.mark.parametrize("name", ["int8", "fp8", "kivi4"])
def test_recall_model_answers_from_codes(name: str) -> None:
    model, document = recall_model()[0], build_document(2048, 20, 11)
    facts = far_facts(document, 4, 11)
    capacity = {"gpu": "1MiB", "cpu": "8MiB"}
    with OffloadedCache(["gpu", "cpu"], codec={"cpu": name}, capacity=capacity) as cache:
        with torch.no_grad():
            for piece in torch.tensor([document.token_ids]).split(512, 1):
                model(piece, past_key_values=cache, logits_to_keep=1)
        host = cache.stats().tiers["cpu"]
        assert host.num_tokens > 1500
        right = [answers(model, cache, document, fact) for fact in facts]
    assert sum(right) == len(facts)


# Sparse policies, and chunks that move.


@pytest.mark.parametrize("tiers", [TIERS, ("gpu", "cpu")], ids=["disk", "no disk"])
@pytest.mark.parametrize("policy", ["leoam", "adaptive"])
def test_sparse_policy_reads_rows_of_codes(
    policy: str, tiers: tuple[str, ...], tmp_path: Path
) -> None:
    model, preset, found = make_model("llama"), in_short_segments(policy), {}
    for codec in ("raw", "int8"):
        slots = 96 if "disk" in tiers else 128
        with open_cache(tmp_path, {"cpu": codec}, slots, tiers, policy=preset) as cache:
            with torch.no_grad():
                model(prompt(1, 660), past_key_values=cache)
            found[codec] = decode(model, cache, prompt(1, 1, seed=4), 5)
            stats = cache.stats()
            assert stats.retrieved_tokens > 0
            assert stats.rows.failed_reads == 0
            if codec != "raw":
                check_used(cache)
    assert error(found["int8"].logits[0], found["raw"].logits[0]) < 0.3


@pytest.mark.leaks
@pytest.mark.parametrize("disk", ["raw", "importance", "int8"])
def test_chunks_exchange_places_with_codes(disk: str, tmp_path: Path) -> None:
    model, preset = make_model("llama"), in_short_segments("adaptive")
    codec = {"cpu": "int8", "disk": disk}
    with open_cache(tmp_path, codec, 40, policy=preset, placement="mass") as cache:
        with torch.no_grad():
            model(prompt(1, 660), past_key_values=cache)
        decode(model, cache, prompt(1, 1, seed=4), 30)
        stats = cache.stats()
        assert stats.promoted_chunks > 0
        assert stats.demoted_chunks > 0
        check_used(cache)


def test_sparse_answers_are_checked_against_codes(tmp_path: Path) -> None:
    model, preset = make_model("llama"), in_short_segments("adaptive")
    assert preset.sparse is not None
    preset = replace(preset, sparse=replace(preset.sparse, check_every=2))
    with open_cache(tmp_path, {"cpu": "int8"}, 96, policy=preset) as cache:
        with torch.no_grad():
            model(prompt(1, 660), past_key_values=cache)
        decode(model, cache, prompt(1, 1, seed=4), 8)
        stats = cache.stats()
        assert stats.num_checks > 0
        assert stats.error_median < 0.5
        check_used(cache)


# What is refused.


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ({"gpu": "int8"}, "codec names tier 'gpu'; those that encode: cpu, disk"),
        ({"tape": "int8"}, "codec names tier 'tape'"),
        ({"cpu": "bf16x"}, "'bf16x' has no fixed rate.*: int8, fp8, kivi4, kivi2"),
        ({"cpu": "auto"}, "'auto' has no fixed rate"),
        ({"cpu": "importance"}, "'importance' has no fixed rate"),
        ({"cpu": 4}, "4 has no fixed rate"),
        ({"disk": "importance"}, "placement='first'"),
        ({"disk": "zip"}, "no codec 'zip'"),
        (4, "must be a name, or map"),
    ],
    ids=str,
)
def test_codec_that_a_tier_cannot_have_is_refused(codec: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        open_cache(tmp_path / "disk", codec)
    assert not (tmp_path / "disk").exists()


def test_codec_of_a_tier_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"codec names tier 'cpu', but the tiers are \['gpu'\]"):
        OffloadedCache(["gpu"], codec={"cpu": "int8"})


def test_policy_that_attends_beside_the_disk_refuses_codes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'instinfer' reads chunks as they are; codec='int8'"):
        open_cache(tmp_path, {"cpu": "int8"}, policy="instinfer")


def test_one_name_is_that_of_the_disk(tmp_path: Path) -> None:
    with open_cache(tmp_path, "kivi4") as cache:
        generate(make_model("llama"), cache, input_ids=prompt(1, 200))
        tiers = cache.stats().tiers
        assert [tier.codec for tier in tiers.values()] == ["raw", "raw", "kivi4"]
        assert not any(isinstance(tier, CodedTier) for tier in runtime_of(cache).engine.tiers)


def test_prompt_that_no_tier_has_room_for_is_undone(tmp_path: Path) -> None:
    model = make_model("llama")
    with open_cache(tmp_path, {"cpu": "int8"}, 12, ("gpu", "cpu")) as cache, torch.no_grad():
        model(prompt(1, 100), past_key_values=cache)
        with pytest.raises(CapacityError, match=r"no room for .*cpu \d+ of \d+"):
            model(prompt(1, 2000), past_key_values=cache)
        assert cache.get_seq_length() == 100
        decode(model, cache, prompt(1, 1), 3)
        check_used(cache)
