"""What a user may ask for; all else is a ConfigError that quotes it, and leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest

from offload import ConfigError, OffloadedCache
from offload.settings import check_settings, check_tiers

CAPACITY = {"gpu": "4MiB", "cpu": "4MiB", "disk": "4MiB"}


def make_cache(tmp_path: Path, **changes: Any) -> OffloadedCache:
    """Make a cache from good arguments with some changed."""
    arguments = {
        "tiers": ["gpu", "cpu", "disk"],
        "policy": "exact",
        "capacity": CAPACITY,
        "disk_path": tmp_path / "disk",
        "chunk_tokens": 16,
    }
    return OffloadedCache(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("tiers", "quoted"),
    [
        (["gpu", "tape"], "'tape'"),
        (["GPU"], "'GPU'"),
        (["gpu", None], "None"),
        (["gpu", ["cpu"]], r"\['cpu'\]"),
        (b"gpu", "103"),
        ([], "empty"),
        ((), "empty"),
        (["gpu", "gpu"], "twice"),
        (["cpu", "gpu"], r"\['cpu', 'gpu'\]"),
        (["gpu", "disk", "cpu"], r"\['gpu', 'cpu', 'disk'\]"),
        ("gpu", "'gpu'"),
        ("gpu,cpu", "'gpu,cpu'"),
        (None, "None"),
        (3, "not 3"),
        ({"gpu", "cpu"}, "must be a list"),
        ({"gpu": 1}, "must be a list"),
    ],
)
def test_tiers_that_are_no_ordered_list_of_known_ones_are_refused(
    tmp_path: Path, tiers: Any, quoted: str
) -> None:
    with pytest.raises(ConfigError, match=quoted):
        make_cache(tmp_path, tiers=tiers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("capacity", "quoted"),
    [
        ({"gpu": "much"}, "'much'"),
        ({"gpu": "1 GiBs"}, "'1 GiBs'"),
        ({"gpu": ""}, "''"),
        ({"gpu": 0}, "0"),
        ({"gpu": -5}, "-5"),
        ({"gpu": "-1GiB"}, "'-1GiB'"),
        ({"gpu": 1.5}, "1.5"),
        ({"gpu": float("nan")}, "nan"),
        ({"gpu": True}, "True"),
        ({"gpu": None}, "None"),
        ({"cpu": "1e9"}, "'1e9'"),
        ({"disk": 2**63}, str(2**63)),
        ({"tape": "1GiB"}, "'tape'"),
        ("2GiB", "'2GiB'"),
        (1 << 30, str(1 << 30)),
        ([("gpu", "1GiB")], "must map"),
    ],
)
def test_capacity_that_is_no_size_of_a_tier_is_refused(
    tmp_path: Path, capacity: Any, quoted: str
) -> None:
    with pytest.raises(ConfigError, match=quoted):
        make_cache(tmp_path, capacity=capacity)
    assert list(tmp_path.iterdir()) == []


def test_capacity_of_a_tier_that_is_not_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"capacity names tier 'disk', but the tiers are"):
        make_cache(tmp_path, tiers=["gpu", "cpu"], disk_path=None)


def test_disk_path_without_a_disk_tier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"disk_path='.*disk' needs the tier 'disk'"):
        make_cache(tmp_path, tiers=["gpu"], capacity={"gpu": "4MiB"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_disk_path_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=str(tmp_path / name)):
        make_cache(tmp_path, disk_path=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("disk_path", [5, b"folder", ["a", 5], []], ids=repr)
def test_disk_path_that_is_no_path_is_refused(tmp_path: Path, disk_path: Any) -> None:
    with pytest.raises(ConfigError, match="disk_path"):
        make_cache(tmp_path, disk_path=disk_path)


@pytest.mark.parametrize("chunk_tokens", [0, -64, True, False, "64", 64.0, None, [64]], ids=repr)
def test_chunk_tokens_that_are_no_positive_int_are_refused(
    tmp_path: Path, chunk_tokens: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_cache(tmp_path, chunk_tokens=chunk_tokens)
    assert repr(chunk_tokens) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("policy", ["lru", "", None, 5, ["exact"]], ids=repr)
def test_unknown_policy_is_refused_and_the_known_ones_are_named(
    tmp_path: Path, policy: Any
) -> None:
    with pytest.raises(ConfigError, match="exact") as caught:
        make_cache(tmp_path, policy=policy)
    assert repr(policy) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.leaks
def test_refused_model_config_leaves_no_folder_behind(tmp_path: Path) -> None:
    from transformers import T5Config

    with pytest.raises(ConfigError, match="T5Config"):
        make_cache(tmp_path, config=T5Config())
    assert [path for path in (tmp_path / "disk").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    "tiers",
    [("gpu",), ("cpu",), ("disk",), ("gpu", "cpu"), ["gpu", "disk"], ["gpu", "cpu", "disk"]],
    ids=str,
)
def test_ordered_tiers_are_accepted(tiers: Any) -> None:
    assert check_tiers(tiers) == tuple(tiers)


@pytest.mark.leaks
def test_good_settings_give_capacities_in_bytes_and_a_private_folder(tmp_path: Path) -> None:
    config = check_settings(["gpu", "disk"], "exact", {"gpu": "1.5 MiB", "disk": 4096}, tmp_path, 8)
    assert config.scratch is not None
    try:
        assert config.capacities == {"gpu": 3 << 19, "disk": 4096}
        assert config.scratch.path.parent == tmp_path
        assert config.scratch.path.stat().st_mode & 0o777 == 0o700
    finally:
        config.scratch.close()


def test_capacity_that_is_not_given_is_measured(tmp_path: Path) -> None:
    with make_cache(tmp_path, capacity={"gpu": 1 << 20}) as cache:
        sizes = {name: tier.capacity_bytes for name, tier in cache.stats().tiers.items()}
    assert sizes["gpu"] == 1 << 20
    assert sizes["cpu"] > 0
    assert sizes["disk"] > 0
