"""What the planner makes of this machine, for the layers of an 8B model: ``offload doctor``."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch

from offload.bandwidth import DiskBandwidth
from offload.machine import Machine
from offload.machine_model import MachineModel, disk_costs, model_machine
from offload.prefetch.planner import break_even_tokens, plan_step
from offload.presets import find_preset
from offload.types import ChunkLayout

_LAYOUT: Final = ChunkLayout(8, 64, 128, 128, torch.bfloat16)
_GROUP_SIZE: Final = 4
"""The layers that costs are forecast for: those of Llama-3.1-8B."""

_CONTEXTS: Final = (8 << 10, 32 << 10, 128 << 10, 1 << 20)


@dataclass(frozen=True, slots=True)
class Step:
    """What one layer takes for one token, by the planner.

    Attributes
    ----------
    num_tokens : int
        Of the context, in memory.
    attention : {"dense", "sparse"}
        What the planner chooses.
    dense_s, sparse_s : float
        Reading everything, and ``policy="adaptive"``.
    """

    num_tokens: int
    attention: str
    dense_s: float
    sparse_s: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What follows from the model of the machine for a layer of an 8B model in bfloat16.

    Attributes
    ----------
    model : MachineModel
    dense_up_to_tokens : int
        The longest context that ``policy="adaptive"`` is not faster on.
    steps : list of Step
    """

    model: MachineModel
    dense_up_to_tokens: int
    steps: list[Step]


def forecast(machine: Machine, disk_bandwidth: DiskBandwidth) -> Forecast:
    """Measure what attention costs on the first CUDA device, or the CPU, and plan some steps."""
    device = torch.device("cuda", machine.gpus[0].index) if machine.gpus else torch.device("cpu")
    sparse = find_preset("adaptive").sparse
    assert sparse is not None
    model = model_machine(_LAYOUT, _GROUP_SIZE, device, index=sparse.index)
    costs = model.costs | disk_costs(_LAYOUT, disk_bandwidth)
    model = replace(model, costs=costs)
    rates = model.rates()
    steps = []
    for num_tokens in _CONTEXTS:
        plan = plan_step(num_tokens, sparse.tokens(num_tokens), rates)
        steps.append(Step(num_tokens, plan.attention, plan.dense_s, plan.sparse_s))
    return Forecast(model, break_even_tokens(sparse.budget, rates), steps)


def forecast_rows(found: Forecast) -> Iterator[tuple[str, str]]:
    """Yield a forecast as rows of a table, each a name and a text."""
    model = found.model
    for name in ("attend.gpu", "attend.cpu", "search"):
        cost = model.costs[name]
        rate = f"{1e-6 / cost.unit_s:.1f} million tokens/s of an 8B layer"
        yield f"model: {name}", f"{cost.fixed_s * 1e6:.0f} µs, then {rate}"
    yield "model: dense up to", f"{found.dense_up_to_tokens:,} tokens"
    for step in found.steps:
        times = f"dense {step.dense_s * 1e3:.2f} ms, adaptive {step.sparse_s * 1e3:.2f} ms"
        yield f"model: {step.num_tokens >> 10}K tokens, a layer", times
