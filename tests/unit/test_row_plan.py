"""What a preset says about reading rows, what is refused, and what the statistics make of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offload import ConfigError, OffloadedCache
from offload.presets import customised, find_preset
from offload.sparse.row_plan import RowPlan
from offload.stats import BusyTime, RowStats
from tests.support.disk import Gate
from tests.support.generation import decode, prompt
from tests.support.models import make_model, tight_capacity


def test_preset_waits_for_every_row_unless_it_is_told_otherwise() -> None:
    assert find_preset("adaptive").rows == RowPlan(None, 0.75)
    assert customised("adaptive").rows.max_wait_s is None
    changed = customised("adaptive", max_wait_us=500, line_share=0.5, budget=0.02)
    assert changed.rows == RowPlan(500.0, 0.5)
    assert changed.rows.max_wait_s == pytest.approx(500e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_wait_us": -1}, "max_wait_us=-1 is no number from 0 to inf"),
        ({"max_wait_us": True}, "max_wait_us=True"),
        ({"max_wait_us": float("nan")}, "max_wait_us=nan"),
        ({"line_share": 1.1}, "line_share=1.1 is no number from 0 to 1"),
        ({"line_share": "half"}, "line_share='half'"),
    ],
)
def test_row_choice_that_is_none_is_refused_with_what_would_do(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        customised("adaptive", **changes)


def test_policy_that_reads_everything_takes_no_wait() -> None:
    with pytest.raises(ConfigError, match="takes no max_wait_us"):
        customised("exact", max_wait_us=100)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_lines_and_staging_of_a_sparse_cache_are_within_its_host_capacity(
    share: float, tmp_path: Path
) -> None:
    model = make_model("llama")
    capacity = tight_capacity(model, 1, 16) | {"cpu": 1 << 20}
    with (
        OffloadedCache(
            ["gpu", "cpu", "disk"],
            policy=customised("adaptive", line_share=share),
            capacity=capacity,
            disk_path=tmp_path,
            chunk_tokens=16,
        ) as cache,
        torch.no_grad(),
    ):
        model(prompt(1, 200), past_key_values=cache)
        decode(model, cache, prompt(1, 3, seed=4))
        runtime = cache._core.runtime
        assert runtime is not None
        engine = runtime.engine
        assert (engine.row_stats().num_lines > 0) == (share > 0)
        assert engine.beside_chunks_bytes("cpu") + engine.tiers[1].capacity_bytes <= 1 << 20
        cache.check_integrity()


def test_shares_are_of_what_was_asked_and_of_the_time_spent_reading() -> None:
    stats = RowStats(line_lookups=200, line_hits=150, wait_s=1.0, read_s=4.0)
    assert (stats.hit_rate, stats.hidden_share) == (0.75, 0.75)
    assert (RowStats().hit_rate, RowStats().hidden_share) == (0.0, 1.0)


def test_busy_time_counts_jobs_that_overlap_once_and_those_that_fail_too() -> None:
    busy, gate = BusyTime(), Gate()
    gate.open()
    busy.run(busy.run, gate)
    once = busy.total_s
    assert once > 0
    with pytest.raises(ZeroDivisionError):
        busy.run(divmod, 1, 0)
    assert busy.total_s > once
