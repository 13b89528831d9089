"""Costs of a simulated box from what was measured: lines, and planes, through times of work."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from offload.bench.sim_machine import Box

_NUM_FITS: Final = 4
_LEAST_S: Final = 1e-9

CAPACITY: Final = {"gpu": 1 << 30, "cpu": 1 << 30, "disk": 4 << 30}
"""Bytes per tier, of the engine that is measured."""

_NO_BUS: Final = 1e15
"""Bytes per second where the device is the host, and nothing moves."""

FloatArray = NDArray[np.float64]
Timing = tuple[tuple[float, ...], float]


@dataclass(slots=True)
class Timings:
    """What was measured: amounts of work, and the seconds that they took together.

    Attributes
    ----------
    prompts : list of (amounts, float)
        Requests, pieces, tokens, pairs of tokens, restores, tokens restored.
    steps : list of (amounts, float)
        Steps, answers, tokens of their contexts.
    saves : list of (amounts, float)
        Saves, tokens saved.
    token_bytes : int
    """

    prompts: list[Timing] = field(default_factory=list)
    steps: list[Timing] = field(default_factory=list)
    saves: list[Timing] = field(default_factory=list)
    token_bytes: int = 1


def fit_box(found: Sequence[Timings]) -> Box:
    """Return the box that fits what was measured, once or several times."""
    token_bytes = found[0].token_bytes
    prompts = fit_costs([timing for each in found for timing in each.prompts])
    request_s, prefill_s, token_s, pair_s, restore_s, read_s = prompts
    steps = fit_costs([timing for each in found for timing in each.steps])
    decode_s, row_s, context_s = steps
    write_s, written_s = fit_costs([timing for each in found for timing in each.saves])
    return Box(
        name="measured",
        token_bytes=token_bytes,
        device_bytes=CAPACITY["gpu"],
        host_bytes=CAPACITY["cpu"],
        disk_bytes=CAPACITY["disk"],
        bus_bytes_per_s=_NO_BUS,
        disk_read_bytes_per_s=token_bytes / max(read_s, _LEAST_S),
        disk_write_bytes_per_s=token_bytes / max(written_s, _LEAST_S),
        disk_latency_s=restore_s,
        write_s=write_s,
        request_s=request_s,
        prefill_s=prefill_s,
        prefill_token_s=max(token_s, _LEAST_S),
        prefill_pair_s=pair_s,
        decode_s=max(decode_s, _LEAST_S),
        decode_row_s=row_s,
        decode_context_s=context_s,
        is_blocking=True,
        attends_on_host=True,
        is_choosy=False,
    )


def fit_costs(timings: Sequence[Timing]) -> tuple[float, ...]:
    """Return what a unit of each amount costs, none less than nothing.

    Errors count as shares of the time that is expected, so short work decides as much as long work,
    and the mean is right where something else on the machine now and then takes its time.
    """
    amounts = np.array([work for work, _ in timings])
    seconds = np.array([took for _, took in timings])
    # An event that was heard late may seem to have taken no time.
    weights = 1 / np.maximum(seconds, seconds.mean() / 100)
    for _ in range(_NUM_FITS):
        costs = _least_squares(amounts * weights[:, None], seconds * weights)
        weights = 1 / np.maximum(amounts @ costs, _LEAST_S)
    return tuple(float(cost) for cost in costs)


def _least_squares(amounts: FloatArray, wanted: FloatArray) -> FloatArray:
    """Solve without costs below nothing, leaving out one after the other."""
    size = amounts.max(0)
    used = [column for column, most in enumerate(size) if most > 0]
    costs = np.zeros(amounts.shape[1])
    while used:
        solved = np.linalg.lstsq(amounts[:, used] / size[used], wanted, rcond=None)[0]
        if (solved >= 0).all():
            costs[used] = solved / size[used]
            break
        del used[int(solved.argmin())]
    return costs
