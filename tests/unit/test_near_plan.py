"""Options of attention beside the disk: what they change, and which are refused, and how."""

import math
import os
from typing import Any

import pytest

from offload.errors import ConfigError
from offload.near_plan import NearPlan
from offload.presets import PRESETS, Preset, customised
from offload.tiers.near.settings import NearSettings
from offload.tiers.near.sparf_settings import SparF


def near(preset: Preset) -> NearPlan:
    assert preset.near is not None
    return preset.near


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mode", "dense"),
        ("budget", 100),
        ("budget", 0.5),
        ("channel_share", 1.0),
        ("group_tokens", 32),
        ("max_queries", 1),
    ],
)
def test_option_of_the_plan_changes_what_it_names_and_nothing_else(option: str, value: Any) -> None:
    before, after = near(PRESETS["instinfer"]), near(customised("instinfer", **{option: value}))
    names = ("mode", "budget", "channel_share", "group_tokens", "max_queries", "settings")
    assert getattr(after, option) == value != getattr(before, option)
    assert all(getattr(after, name) == getattr(before, name) for name in names if name != option)


@pytest.mark.parametrize(
    "option",
    ["workers_per_path", "block_tokens", "memory_bytes", "cpus_per_worker", "num_threads"],
)
def test_option_of_the_workers_changes_what_it_names(option: str) -> None:
    changed = near(customised("instinfer", **{option: 64}))  # type: ignore[arg-type]
    assert getattr(changed.settings, option) == 64
    assert changed.mode == near(PRESETS["instinfer"]).mode


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"modus": "dense"}, "takes no modus; it takes mode, budget.* num_threads"),
        ({"modus": 1, "leaf_tokens": 2}, "takes no modus or leaf_tokens"),
        ({"mode": "dens"}, "mode='dens' is neither 'sparf' nor 'dense'"),
        ({"mode": None}, "mode=None is neither"),
        ({"budget": 0}, "budget=0 is neither"),
        ({"budget": 1.5}, r"budget=1\.5 is neither"),
        ({"budget": True}, "budget=True is neither"),
        ({"channel_share": 0}, "channel_share=0 is no share"),
        ({"channel_share": 1.01}, r"channel_share=1\.01 is no share"),
        ({"channel_share": math.nan}, "channel_share=nan is no share"),
        ({"channel_share": "all"}, "channel_share='all' is no share"),
        ({"group_tokens": 0}, "group_tokens=0 is no positive number"),
        ({"group_tokens": 16.0}, r"group_tokens=16\.0 is no positive number"),
        ({"max_queries": True}, "max_queries=True is no positive number"),
        ({"workers_per_path": 0}, "workers_per_path must be at least 1, not 0"),
        ({"num_threads": -1}, "num_threads must be at least 1, not -1"),
        ({"block_tokens": 0}, "block_tokens must be at least 1, not 0"),
    ],
    ids=str,
)
def test_option_that_is_none_is_refused_and_quoted(options: dict[str, Any], quoted: str) -> None:
    with pytest.raises(ConfigError, match=quoted):
        customised("instinfer", **options)


@pytest.mark.parametrize("option", ["sink_tokens", "dense_layers", "error", "max_wait_us"])
def test_option_of_sparse_presets_is_refused(option: str) -> None:
    value: Any = 0.5 if option == "error" else 1
    with pytest.raises(ConfigError, match=f"'instinfer' reads everything; it takes no {option}"):
        customised("instinfer", **{option: value})


def test_patience_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"patience_s must be positive, not 0\.0"):
        NearSettings(patience_s=0.0)


@pytest.mark.parametrize(("key_dim", "channels"), [(128, 16), (64, 8), (20, 2), (3, 1), (1, 1)])
def test_share_of_the_channels_is_at_least_one(key_dim: int, channels: int) -> None:
    assert NearPlan(channel_share=1 / 8).how(key_dim) == SparF(channels, 1 / 16, 16)
    assert NearPlan(mode="dense").how(key_dim) is None


@pytest.mark.parametrize(
    ("tokens", "asked", "groups"),
    [(0.25, 256, 4), (0.25, 250, 4), (100, 256, 7), (1, 256, 1), (0.0001, 256, 1), (999, 256, 16)],
)
def test_number_of_groups_covers_the_wanted_tokens_and_no_more_than_there_are(
    tokens: float, asked: int, groups: int
) -> None:
    assert SparF(4, tokens).num_groups(asked, 16) == groups


@pytest.mark.parametrize("per_worker", [0, 1, 3])
def test_workers_stay_on_cores_that_there_are(per_worker: int) -> None:
    cores = os.sched_getaffinity(0)
    settings = NearSettings(cpus_per_worker=per_worker)
    chosen = [settings.cpus_of(number) for number in range(4)]
    assert all(set(each) <= cores for each in chosen)
    assert all(len(each) == min(per_worker, len(cores)) for each in chosen)
    if per_worker == 1:
        assert len(set(chosen)) == min(4, len(cores))
