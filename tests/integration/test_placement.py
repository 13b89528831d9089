"""Caches whose chunks change places by attention: the same answers, and nothing is lost."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload import ConfigError, OffloadedCache
from offload.placement import PLACEMENTS
from offload.presets import Preset, customised
from offload.sparse.segments import SegmentSizes
from offload.tiers.codec_ladder import codec_of
from offload.tiers.faults import FaultPlan
from offload.tiers.faulty import FaultyTier
from tests.support.generation import CHOICE_ERROR, decode, prompt
from tests.support.models import make_model

TIERS = ("gpu", "cpu", "disk")
SIZE, NUM_TOKENS, NUM_STEPS = 16, 661, 40
SLOT_BYTES = 8192
CAPACITY: dict[str, int | str] = {"gpu": 20 * SLOT_BYTES, "cpu": 48 * SLOT_BYTES, "disk": "16MiB"}
"""Most of 82 chunks are on the disk; two at a time can change places."""

MOVING = [name for name in PLACEMENTS if name != "first"]


def sparse(policy: str = "adaptive") -> Preset:
    """Let a policy choose in a short context, whose rows are not kept apart from their chunks."""
    preset = customised(policy, budget=0.1, window_tokens=64, dense_layers=0, line_share=0.0)
    assert preset.sparse is not None
    return replace(preset, sparse=replace(preset.sparse, sizes=SegmentSizes((128,)), early=None))


def open_cache(
    scratch: Path, placement: str = "mass", policy: str = "adaptive", **changes: Any
) -> OffloadedCache:
    arguments: dict[str, Any] = {"capacity": CAPACITY, "disk_path": scratch, "chunk_tokens": SIZE}
    return OffloadedCache(
        TIERS, policy=sparse(policy), placement=placement, **{**arguments, **changes}
    )


@torch.no_grad()
def fill(cache: OffloadedCache, batch: int = 1) -> None:
    make_model("llama")(prompt(batch, NUM_TOKENS), past_key_values=cache)


def ask(cache: OffloadedCache, steps: int = NUM_STEPS, seed: int = 4) -> list[Tensor]:
    """Decode, and return the logits of every step."""
    return list(decode(make_model("llama"), cache, prompt(1, 1, seed=seed), steps).logits)


def check_moved(cache: OffloadedCache) -> None:
    stats = cache.stats()
    assert stats.promoted_chunks > 0
    assert stats.demoted_chunks > 0
    assert all(tier.peak_bytes <= tier.capacity_bytes for tier in stats.tiers.values())
    cache.check_integrity()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[OffloadedCache]:
    with open_cache(tmp_path) as cache:
        fill(cache)
        yield cache


@pytest.mark.leaks
@pytest.mark.parametrize("policy", ["adaptive", "leoam"])
@pytest.mark.parametrize("placement", MOVING)
def test_chunks_that_move_change_no_answer(placement: str, policy: str, tmp_path: Path) -> None:
    found = {}
    for name in ("first", placement):
        with open_cache(tmp_path, name, policy) as cache:
            fill(cache)
            found[name] = ask(cache)
            if name == "first":
                assert cache.stats().promoted_chunks == cache.stats().demoted_chunks == 0
            else:
                check_moved(cache)
    for one, other in zip(*found.values(), strict=True):
        assert torch.allclose(one, other, atol=CHOICE_ERROR)


@pytest.mark.leaks
def test_forks_move_the_chunks_they_share_and_answer_as_if_alone(cache: OffloadedCache) -> None:
    expected = []
    for seed in (1, 2, 3):
        with cache.fork() as fork:
            expected.append(ask(fork, 9, seed=seed))
    forks = [cache.fork() for _ in range(3)]
    tokens = [prompt(1, 1, seed=seed) for seed in (1, 2, 3)]
    for step in range(9):
        for number, fork in enumerate(forks):
            [logits] = decode(make_model("llama"), fork, tokens[number], 1).logits
            assert torch.allclose(logits, expected[number][step], atol=CHOICE_ERROR)
            tokens[number] = logits.argmax(-1, keepdim=True)
    for fork in forks:
        fork.close()


@pytest.mark.leaks
def test_cache_is_cropped_and_grows_again_while_chunks_move(cache: OffloadedCache) -> None:
    ask(cache, 10)
    cache.crop(-200)
    with torch.no_grad():
        make_model("llama")(prompt(1, 300, seed=5), past_key_values=cache)
    ask(cache, 30)
    check_moved(cache)


@pytest.mark.leaks
def test_rows_of_a_batch_and_beams_share_exchanges(tmp_path: Path) -> None:
    capacity = CAPACITY | {"gpu": 40 * SLOT_BYTES}
    with open_cache(tmp_path, capacity=capacity) as cache:
        fill(cache, 2)
        decode(make_model("llama"), cache, prompt(2, 1, seed=4), 12)
        cache.batch_select_indices(torch.tensor([1, 1]))
        decode(make_model("llama"), cache, prompt(2, 1, seed=4), 24)
        check_moved(cache)


@pytest.mark.leaks
def test_closing_in_the_middle_of_exchanges_leaves_nothing(tmp_path: Path) -> None:
    scratch = tmp_path / "disk"
    with open_cache(scratch) as cache:
        fill(cache)
        ask(cache, 5)
        runtime = cache._core.runtime
        assert runtime is not None
        assert runtime.engine.exchange is not None
        assert runtime.engine.exchange._under_way
    assert [path for path in scratch.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("fail", [0.2, 1.0])
def test_disk_that_fails_exchanges_fails_no_step(fail: float, tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache._core.config = replace(cache._core.config, faults=FaultPlan(fail=fail))
        decode(make_model("llama"), cache, prompt(1, 1), 1)
        runtime = cache._core.runtime
        assert runtime is not None
        disk, retrieval = runtime.engine.tiers[-1], runtime.engine.retrieval
        assert isinstance(disk, FaultyTier)
        assert retrieval is not None
        assert retrieval._watch is not None
        disk.is_armed = False
        fill(cache)
        cache.flush()
        # Only what exchanges begin may fail.
        arm, disarm = (partial(setattr, disk, "is_armed", armed) for armed in (True, False))
        reports = retrieval._watch._reports
        retrieval._watch._reports = [lambda _: arm(), *reports, lambda _: disarm()]
        ask(cache)
        cache.flush()
        stats = cache.stats()
        assert stats.failed_exchanges > 0
        assert (stats.promoted_chunks > 0) == (fail < 1)
        cache.check_integrity()


def codecs_on_disk(cache: OffloadedCache) -> set[str]:
    """Read every chunk that lies on the disk only; return how they were stored."""
    runtime = cache._core.runtime
    assert runtime is not None
    engine = runtime.engine
    engine.settle()
    assert engine.disk is not None
    engine.disk.meter.take_decoded()
    for chunk in engine.store.table:
        if engine.store.level_of(chunk) == len(TIERS) - 1:
            engine.store.read_chunk(chunk)
    return {codec_of(number).name for number in engine.disk.meter.take_decoded()}


@pytest.mark.leaks
def test_chunks_that_leave_are_stored_in_the_fewer_bits_the_less_they_matter(
    tmp_path: Path,
) -> None:
    with open_cache(tmp_path, codec="importance") as cache:
        fill(cache)
        cache.flush()
        assert codecs_on_disk(cache) == {"int8"}
        ask(cache)
        found = codecs_on_disk(cache)
        assert found > {"int8"}
        assert found <= {"int8", "kivi4", "kivi2"}
        check_moved(cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": "best"}, r"unknown placement 'best'; known: first, recent, mass"),
        ({"policy": "exact"}, "'exact' always reads the same"),
        ({"policy": "streaming"}, "'streaming' always reads the same"),
        ({"tiers": ["gpu", "cpu"]}, "moves chunks between memory and disk"),
        ({"tiers": ["disk"]}, "moves chunks between memory and disk"),
        ({"placement": "first", "codec": "importance"}, "codec='importance' is for chunks that"),
    ],
)
def test_placement_that_makes_no_sense_is_refused_before_any_work(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"tiers": TIERS, "policy": "adaptive", "placement": "mass"}
    with pytest.raises(ConfigError, match=message):
        OffloadedCache(**{**arguments, **changes})
    assert list(tmp_path.iterdir()) == []
