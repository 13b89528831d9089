"""Caches whose chunks lie encoded on the disk: the same tokens without loss, close with some."""

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from offload import ConfigError, OffloadedCache, pipeline_start
from offload.bandwidth import PIECE_BYTES, DiskBandwidth
from offload.engine import Engine
from offload.presets import Preset, customised
from offload.sparse.segments import SegmentSizes
from offload.stats import CacheStats
from offload.tiers.codec_ladder import CODECS, find_codec
from tests.support.generation import prompt
from tests.support.models import make_model

TIERS = ("gpu", "cpu", "disk")
SIZE = 16
NUM_TOKENS = 661
SLOT_BYTES = 4096
CAPACITY: dict[str, int | str] = {"gpu": 20 * SLOT_BYTES, "cpu": 32 * SLOT_BYTES, "disk": "16MiB"}
"""Most of 123 chunks of a page each are on the disk."""

LOSSY = [name for name, codec in CODECS.items() if not codec.is_lossless]


@functools.cache
def bf16_model() -> PreTrainedModel:
    return copy.deepcopy(make_model("llama")).bfloat16()


def short_segments(policy: str) -> Preset:
    preset = customised(policy, budget=0.1)
    assert preset.sparse is not None
    return replace(preset, sparse=replace(preset.sparse, sizes=SegmentSizes((128,))))


def open_cache(
    scratch: Path, codec: str, policy: str | Preset = "exact", **changes: Any
) -> OffloadedCache:
    arguments: dict[str, Any] = {"capacity": CAPACITY, "disk_path": scratch, "chunk_tokens": SIZE}
    return OffloadedCache(TIERS, codec=codec, policy=policy, **{**arguments, **changes})


def generate(cache: OffloadedCache | DynamicCache) -> Tensor:
    model: Any = bf16_model()
    with torch.no_grad():
        model(prompt(1, NUM_TOKENS - 1), past_key_values=cache)
    tokens: Tensor = model.generate(
        prompt(1, NUM_TOKENS), past_key_values=cache, max_new_tokens=6, do_sample=False
    )
    return tokens[:, NUM_TOKENS:]


def logits(cache: OffloadedCache) -> Tensor:
    """Return what the model says after the prompt, having decoded one token."""
    model: Any = bf16_model()
    with torch.no_grad():
        model(prompt(1, NUM_TOKENS - 1), past_key_values=cache)
        found: Tensor = model(prompt(1, 1, seed=9), past_key_values=cache).logits[0, -1]
    return found.float()


def engine_of(cache: OffloadedCache) -> Engine:
    assert cache._core.runtime is not None
    return cache._core.runtime.engine


def decoded_by(cache: OffloadedCache) -> set[int]:
    """Return the numbers of the codecs that something was decoded by since it was asked last."""
    disk = engine_of(cache).disk
    assert disk is not None
    return set(disk.meter.take_decoded())


def check_sane(cache: OffloadedCache, stats: CacheStats) -> None:
    disk = stats.tiers["disk"]
    assert disk.num_chunks > 60
    assert disk.loaded_bytes > 0
    assert disk.stored_bytes > 0
    assert all(tier.peak_bytes <= tier.capacity_bytes for tier in stats.tiers.values())
    assert stats.failed_stores == stats.rescued_chunks == stats.rows.failed_reads == 0
    cache.check_integrity()


@pytest.mark.leaks
@pytest.mark.parametrize("policy", ["exact", "adaptive"])
def test_lossless_codec_gives_the_tokens_of_raw_chunks(policy: str, tmp_path: Path) -> None:
    preset = policy if policy == "exact" else short_segments(policy)
    tokens = {}
    for codec in ("raw", "bf16x"):
        with open_cache(tmp_path, codec, preset) as cache:
            tokens[codec] = generate(cache)
            check_sane(cache, cache.stats())
    assert torch.equal(tokens["raw"], tokens["bf16x"])
    if policy == "exact":
        assert torch.equal(tokens["raw"], generate(DynamicCache()))


@pytest.mark.parametrize("codec", CODECS)
def test_chunks_are_decoded_by_the_codec_that_was_asked_for(codec: str, tmp_path: Path) -> None:
    with open_cache(tmp_path, codec) as cache:
        logits(cache)
        number = find_codec(codec).number
        assert decoded_by(cache) == ({number} if number else set())


@pytest.mark.parametrize(
    ("policy", "codec"),
    [*(("exact", codec) for codec in LOSSY), ("adaptive", "kivi4"), ("leoam", "int8")],
)
def test_codec_with_loss_runs_and_stays_close_to_raw_chunks(
    policy: str, codec: str, tmp_path: Path
) -> None:
    preset = policy if policy == "exact" else short_segments(policy)
    found = {}
    for name in ("raw", codec):
        with open_cache(tmp_path, name, preset) as cache:
            found[name] = logits(cache)
            stats = cache.stats()
            check_sane(cache, stats)
            assert (stats.retrieved_tokens > 0) == (policy != "exact")
            assert (stats.pipeline is None) == (policy == "exact")
            if stats.pipeline is not None:
                pipeline = json.loads(json.dumps(stats.pipeline, allow_nan=False))
                share = 0.0 if name == "raw" else 1.0
                assert (pipeline["codec"], pipeline["encoded_share"]) == (name, share)
                assert pipeline["stages"]["compute"]["num_samples"] > 0
    assert bool(found[codec].isfinite().all())
    error = float((found[codec] - found["raw"]).norm() / found["raw"].norm())
    assert 0 < error < (1.2 if codec == "kivi2" else 0.5)


@pytest.mark.parametrize(
    ("bytes_per_s", "is_encoded"), [(50e6, True), (50e9, False)], ids=["slow", "fast"]
)
@pytest.mark.parametrize("policy", ["exact", "leoam"])
def test_auto_encodes_what_a_slow_disk_is_given_and_nothing_for_a_fast_one(
    policy: str,
    bytes_per_s: float,
    is_encoded: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rate = bytes_per_s / PIECE_BYTES
    found = DiskBandwidth(bytes_per_s, bytes_per_s, True, 1e-4, rate)
    monkeypatch.setattr(pipeline_start, "measure_disk", lambda *_: found)
    with open_cache(tmp_path, "auto", policy) as cache:
        tokens = generate(cache)
        stats = cache.stats()
        check_sane(cache, stats)
        pipeline = json.loads(json.dumps(stats.pipeline, allow_nan=False))
        assert (pipeline["codec"] != "raw") == (pipeline["encoded_share"] > 0) == is_encoded
        if policy == "exact":
            assert (len(decoded_by(cache)) > 0) == is_encoded
    if policy == "exact":  # which takes lossless codecs only
        assert torch.equal(tokens, generate(DynamicCache()))


def test_auto_on_a_real_disk_measures_it_and_runs(tmp_path: Path) -> None:
    with open_cache(tmp_path, "auto") as cache:
        assert torch.equal(generate(cache), generate(DynamicCache()))
        pipeline = cache.stats().pipeline
    assert pipeline is not None
    assert pipeline["disk_bytes_per_s"] > 0
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("codec", [*LOSSY, "bf16x", "auto"])
@pytest.mark.parametrize("tiers", [("gpu",), ("cpu",), ("gpu", "cpu")])
def test_codec_without_a_disk_is_refused(tiers: tuple[str, ...], codec: str) -> None:
    with pytest.raises(ConfigError, match=f"codec='{codec}' is for the tier 'disk'"):
        OffloadedCache(tiers, codec=codec)


def test_raw_needs_no_disk() -> None:
    OffloadedCache(("gpu",), codec="raw").close()


@pytest.mark.parametrize("codec", ["zip", "", "KIVI4"])
def test_codec_that_there_is_not_is_refused_before_anything_is_made(
    codec: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"no codec '{codec}'; there are raw, bf16x, int8"):
        open_cache(tmp_path, codec)
    assert list(tmp_path.iterdir()) == []
