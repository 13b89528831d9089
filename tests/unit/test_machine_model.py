from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload import machine_model
from offload.bandwidth import DiskBandwidth
from offload.errors import ConfigError, StorageError
from offload.forecast import Forecast, Step, forecast_rows
from offload.machine_model import MachineModel, disk_costs, line_through, model_machine
from offload.prefetch.planner import plan_step
from offload.prefetch.rates import Cost
from offload.presets import find_preset
from offload.types import ChunkLayout

CPU = torch.device("cpu")
LAYOUT = ChunkLayout(2, 64, 64, 64, torch.float32)
MEMORY = {"attend.gpu", "attend.cpu", "gather.gpu", "gather.cpu", "load.cpu"}
DISK = {"load.disk", "gather.disk"}

pytestmark = pytest.mark.leaks


@pytest.fixture(scope="module")
def model() -> MachineModel:
    sparse = find_preset("adaptive").sparse
    assert sparse is not None
    return model_machine(LAYOUT, 2, CPU, index=sparse.index)


def test_model_of_this_machine_names_what_it_can_do(model: MachineModel) -> None:
    assert set(model.costs) == MEMORY | {"search"}
    assert model.token_bytes == 2 * 128 * 4
    assert model.rates().is_shared


def test_model_plans_a_step_of_which_more_context_takes_longer(model: MachineModel) -> None:
    short, long = (plan_step(n, n // 100, model.rates()) for n in (1 << 10, 1 << 20))
    assert 0 < short.dense_s < long.dense_s
    assert 0 < short.sparse_s < long.sparse_s


def test_model_of_the_same_machine_is_measured_once_and_followed_separately(
    model: MachineModel,
) -> None:
    sparse = find_preset("adaptive").sparse
    assert sparse is not None
    again = model_machine(LAYOUT, 2, CPU, index=replace(sparse).index)
    assert again is model
    one, other = model.rates(), again.rates()
    one.observe("search", 1 << 20, 100.0)
    assert other.cost("search") == model.costs["search"]


def test_model_without_an_index_always_attends_to_everything() -> None:
    rates = model_machine(LAYOUT, 2, CPU).rates()
    assert "search" not in rates
    assert plan_step(1 << 20, 1, rates).attention == "dense"


def test_model_with_a_disk_measures_it_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    measured = model_machine(LAYOUT, 2, CPU, directory=directory)
    assert set(measured.costs) == MEMORY | DISK
    assert list(directory.iterdir()) == []
    monkeypatch.delattr(machine_model, "measure_disk")
    assert model_machine(LAYOUT, 4, CPU, directory=directory).costs.keys() >= DISK


def test_model_with_a_disk_that_cannot_be_used_raises_and_can_be_asked_again(
    tmp_path: Path,
) -> None:
    missing = tmp_path / "missing"
    with pytest.raises((ConfigError, StorageError), match="missing"):
        model_machine(LAYOUT, 2, CPU, directory=missing)
    missing.mkdir()
    assert "load.disk" in model_machine(LAYOUT, 2, CPU, directory=missing).costs


def test_model_without_query_heads_raises() -> None:
    with pytest.raises(ConfigError, match="0 heads"):
        model_machine(LAYOUT, 0, CPU)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((3.0, 12.0), Cost(2.0, 0.1)),
        ((1.0, 10.0), Cost(0.0, 0.1)),
        ((0.5, 10.0), Cost(0.0, 9.5 / 90)),
        ((10.0, 10.0), Cost(5.0, 0.05)),
        ((50.0, 10.0), Cost(5.0, 0.05)),
    ],
    ids=["fixed", "none-fixed", "falling", "flat", "noise"],
)
def test_line_through_two_times_never_rises_from_below_nothing_nor_falls(
    seconds: tuple[float, float], expected: Cost
) -> None:
    found = line_through((10, 100), seconds)
    assert (found.fixed_s, found.unit_s) == pytest.approx((expected.fixed_s, expected.unit_s))


@pytest.mark.parametrize(
    ("head_bytes", "per_token_s"),
    [(4 << 10, 2e-4), (32 << 10, 2e-4), (64 << 10, 4e-4)],
)
def test_disk_costs_of_single_tokens_are_reads_of_heads_of_chunks(
    head_bytes: int, per_token_s: float
) -> None:
    layout = ChunkLayout(2, 64, head_bytes // 256, head_bytes // 256, torch.float16)
    disk = DiskBandwidth(1e9, 1e9, True, read_latency_s=1e-4, pieces_per_s=1e4)
    costs = disk_costs(layout, disk)
    assert costs["load.disk"] == Cost(1e-4, 1e-9)
    assert costs["gather.disk"].unit_s == pytest.approx(per_token_s)


def test_forecast_rows_say_where_dense_ends_and_what_steps_take() -> None:
    costs = dict.fromkeys(("attend.gpu", "attend.cpu", "search"), Cost(5e-6, 1e-6))
    steps = [Step(128 << 10, "sparse", 52e-3, 4.9e-3)]
    rows = dict(forecast_rows(Forecast(MachineModel(LAYOUT, CPU, costs), 6100, steps)))
    assert rows["model: dense up to"] == "6,100 tokens"
    assert rows["model: 128K tokens, a layer"] == "dense 52.00 ms, adaptive 4.90 ms"
    assert rows["model: search"].startswith("5 µs, then 1.0 million tokens/s")
