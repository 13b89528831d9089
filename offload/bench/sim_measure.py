"""Measure the rates of this machine that a simulated box is made of, with the daemon's engine.

Each rate is measured alone: prompts without answers beside them, answers without prompts, saves and
restores of idle sessions. Costs are lines (or planes) through what was measured.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from offload.bench.sim_ask import TENANT, ask
from offload.bench.sim_machine import Box
from offload.daemon.engine import DaemonEngine
from offload.daemon.engine_settings import EngineSettings, SessionSettings
from offload.daemon.served_model import ServedModel
from offload.errors import ConfigError

_PROMPTS: Final = (256, 1024, 4096)
_BATCHES: Final = (1, 2, 4, 8)
_CONTEXTS: Final = (512, 2048)
_MORE: Final = (16, 128, 384)
_STEPS: Final = 48
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


def measure_box(
    model: ServedModel,
    folder: Path,
    rounds: int = 2,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Box:
    """Return a box with this machine's rates; a round takes a quarter of a minute.

    Parameters
    ----------
    model : ServedModel
        On the CPU.
    folder : Path
        Exists, on the disk that is to be measured; removed again is what is written there.
    rounds : int
    progress : callable
        Told how many rounds are done, and of how many.

    Raises
    ------
    ConfigError
        The model is not on the CPU: what its bus carries is not measured here.
    """
    found = []
    for number in range(rounds):
        found.append(measure_timings(model, folder))
        progress(number + 1, rounds)
    return fit_box(found)


def measure_timings(model: ServedModel, folder: Path) -> Timings:
    """Measure once; see ``measure_box``."""
    if model.model.device.type != "cpu":
        raise ConfigError(f"rates are measured on a CPU, but the model is on {model.model.device}")
    with tempfile.TemporaryDirectory(dir=folder) as own:
        settings = EngineSettings(
            Path(own),
            capacity=CAPACITY,
            min_free_bytes=0,
            sessions=SessionSettings(persist="never", idle_to_host_s=None, idle_to_disk_s=None),
        )
        engine = DaemonEngine(model, settings)
        engine.start()
        try:
            return asyncio.run(_measure(engine))
        finally:
            engine.close()


async def _measure(engine: DaemonEngine) -> Timings:
    found = Timings()
    await ask(engine, _ids(512, 0), "warm", 4)
    for size in _PROMPTS:
        await _measure_prompt(engine, found, size)
    for context in _CONTEXTS:
        for row in range(_BATCHES[-1]):
            await ask(engine, _ids(context, 10 * context + row), f"{context}-{row}", 1)
        for turn, batch in enumerate(_BATCHES):
            await _measure_steps(engine, found, context, batch, turn)
    [view] = [each for each in await engine.sessions.list(TENANT) if each.name == "warm"]
    found.token_bytes = view.size_bytes // view.num_tokens
    return found


async def _measure_prompt(engine: DaemonEngine, found: Timings, size: int) -> None:
    """Measure a cold prompt, more turns of it, saving them, and turns after they left memory."""
    name, ids = f"prompt-{size}", _ids(size, size)
    heard = await ask(engine, ids, name, 1)
    for (before, began_s), (after, ended_s) in pairwise(heard.pieces):
        work = (0.0, *_piece(after - before, before), 0.0, 0.0)
        found.prompts.append((work, ended_s - began_s))
    done, took_s = heard.pieces[0]
    found.prompts.append(((1.0, *_piece(done, 0), 0.0, 0.0), took_s))
    await _save(engine, found, name, size)
    for is_restored in (False, True):
        for seed, more in enumerate(_MORE):
            ids = (*ids, *heard.tokens, *_ids(more, seed))
            if is_restored:
                await engine.sessions.evict(TENANT, name, "disk")
            heard = await ask(engine, ids, name, 1)
            known = len(ids) - more - 1
            restored = (1.0, float(known)) if is_restored else (0.0, 0.0)
            work = (1.0, *_piece(more + 1, known), *restored)
            found.prompts.append((work, heard.first_s))
            await _save(engine, found, name, more)


async def _save(engine: DaemonEngine, found: Timings, name: str, num_new: int) -> None:
    began = time.monotonic()
    await engine.sessions.persist(TENANT, name)
    found.saves.append(((1.0, float(num_new)), time.monotonic() - began))


async def _measure_steps(
    engine: DaemonEngine, found: Timings, context: int, batch: int, turn: int
) -> None:
    """Measure answers of so many sessions side by side."""
    # What they answered before is not known here, so every turn leaves them at the same place.
    heard = await asyncio.gather(
        *(
            ask(
                engine,
                (*_ids(context, 10 * context + row), *_ids(2, turn)),
                f"{context}-{row}",
                _STEPS,
            )
            for row in range(batch)
        )
    )
    begin_s, end_s = max(each.token_s[0] for each in heard), min(each.token_s[-1] for each in heard)
    steps = [
        after - before
        for before, after in pairwise(heard[0].token_s)
        if begin_s <= before and after <= end_s
    ]
    if steps:
        work = (1.0, float(batch), float(batch * (context + _STEPS // 2)))
        found.steps.append((work, statistics.fmean(steps)))


def _piece(size: int, before: int) -> tuple[float, float, float]:
    return 1.0, float(size), size * (before + size / 2)


def fit_box(found: Sequence[Timings]) -> Box:
    """Return the box that fits what was measured, once or several times."""
    token_bytes = found[0].token_bytes
    request_s, prefill_s, token_s, pair_s, restore_s, read_s = fit_costs(
        [timing for each in found for timing in each.prompts]
    )
    decode_s, row_s, context_s = fit_costs([timing for each in found for timing in each.steps])
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
    weights = 1 / seconds
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


def _ids(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(32, 127, (count,), generator=generator).tolist())
