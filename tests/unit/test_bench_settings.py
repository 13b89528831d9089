"""What a benchmark measures: cells, tiers, contenders, and what is refused."""

from typing import Any

import pytest

from offload.bench.contenders import expand, find_entries
from offload.bench.placement import near_storage, place, streaming
from offload.bench.settings import Cell
from offload.bench.suites import SUITES, find_suite
from offload.errors import ConfigError
from tests.support.bench import make_settings


def test_cells_of_settings_are_all_combinations() -> None:
    settings = make_settings(contexts=(512, 1024), batches=(1, 4), ram_shares=(None, 0.1))
    cells = list(settings.cells())
    assert len(cells) == len(set(cells)) == 8
    assert Cell(1024, 4, 0.1) in cells


def test_kv_bytes_of_a_cell_count_the_steps_too() -> None:
    settings = make_settings()
    assert settings.num_steps == 1 + 2 * (1 + 2)
    assert settings.kv_bytes(Cell(512, 3, None)) == 2 * 3 * (512 + 7) * 2 * 64 * 2 * 4


@pytest.mark.parametrize(
    ("ram_share", "has_device", "tiers"),
    [
        (None, False, ("gpu",)),
        (0.1, False, ("gpu", "cpu", "disk")),
        (None, True, ("gpu", "cpu")),
        (0.1, True, ("gpu", "cpu", "disk")),
    ],
)
def test_place_chooses_tiers_by_device_and_share(
    ram_share: float | None, has_device: bool, tiers: tuple[str, ...]
) -> None:
    settings, cell = make_settings(), Cell(512, 1, ram_share)
    found = place(settings, cell, has_device=has_device)
    assert found.tiers == tiers
    kv_bytes = settings.kv_bytes(cell)
    assert int(found.capacity[tiers[-1]]) > kv_bytes
    if ram_share is not None:
        in_memory = [found.capacity[name] for name in tiers[:-1] if not has_device or name == "cpu"]
        assert sum(map(int, in_memory)) == int(0.1 * kv_bytes)
    if has_device:
        assert found.capacity["gpu"] == int(0.1 * kv_bytes)


def test_place_of_capacities_that_are_given_takes_them() -> None:
    given = {"gpu": "1MiB", "disk": "1GiB"}
    settings = make_settings(capacity=given)
    assert place(settings, Cell(512, 1, None), has_device=False).capacity == given


def test_streaming_keeps_nothing_in_memory() -> None:
    assert streaming(make_settings(), Cell(512, 1, None)).tiers == ("disk",)


def test_streaming_keeps_the_share_that_the_cell_gives_and_workers_keep_it_themselves() -> None:
    settings, cell = make_settings(), Cell(512, 1, 0.25)
    found = streaming(settings, cell).capacity
    assert found["cpu"] == settings.kv_bytes(cell) // 4
    assert near_storage(settings, cell) == streaming(settings, Cell(512, 1, None))


def test_expand_gives_budgets_to_sparse_policies_that_have_none() -> None:
    found = expand(["dense", "exact", "adaptive", "quest:64"], ["0.01", "100"])
    assert found == ("dense", "exact", "adaptive:0.01", "adaptive:100", "quest:64")


def test_entries_of_policies_are_sparse_from_the_first_layer_on() -> None:
    names = ("flexgen", "exact", "quest", "streaming")
    flexgen, exact, quest, streaming_ = find_entries(make_settings(contenders=names))
    assert flexgen.is_dense
    assert exact.is_dense
    assert quest.policy is not None
    assert quest.policy.sparse is not None
    assert quest.policy.sparse.dense_layers == 0
    assert [each.has_index for each in (flexgen, exact, quest, streaming_)] == [
        *(False, False, True, False)
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt"}, "unknown shape 'gpt'; known: llama-3.1-8b"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"correlation": 1.5}, r"query correlation 1.5 is not from 0 to 1"),
        ({"ram_shares": (0.0,)}, "share 0.0 is not above 0"),
        ({"has_prefill": True}, "prefill needs a model"),
        ({"contenders": ("exact", "exact")}, "a contender appears twice"),
        ({"device": "cuda"}, "sees no CUDA"),
    ],
)
def test_settings_that_are_impossible_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_settings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contenders": ("fast",)}, "unknown contender 'fast'; known: dense, dynamic"),
        ({"contenders": ("offloading",)}, "'offloading' needs a CUDA device"),
        ({"contenders": ("dense",), "level": "decode"}, "'dense' is no cache"),
        ({"contenders": ("retrieval_attention",)}, "learns from a prompt's queries"),
        ({"contenders": ("adaptive:x",)}, "x"),
    ],
)
def test_contenders_that_cannot_take_part_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_entries(make_settings(**changes))


@pytest.mark.parametrize("name", [name for name, suite in SUITES.items() if not suite.needs_device])
def test_suite_without_a_device_has_contenders_that_can_take_part(name: str) -> None:
    for part in find_suite(name).parts:
        settings = make_settings(**{**part, "model": "llama-3.1-8b"})
        assert len(find_entries(settings)) == len(part["contenders"])


def test_suite_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="unknown suite 'tpu'; known: cpu-ram"):
        find_suite("tpu")
