"""Measure the rates of this machine that a simulated box is made of, with the daemon's engine.

Each rate is measured alone: prompts without answers beside them, answers without prompts, saves and
restores of idle sessions. Costs are lines (or planes) through what was measured.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch

from offload.bench.sim_ask import TENANT, Clock, ask, engine_clock
from offload.bench.sim_fit import CAPACITY, Timings, fit_box
from offload.bench.sim_machine import Box
from offload.daemon.engine import DaemonEngine
from offload.daemon.engine_settings import EngineSettings, SessionSettings
from offload.daemon.served_model import ServedModel
from offload.errors import ConfigError

_PROMPTS: Final = (256, 1024, 4096)
_BATCHES: Final = (1, 4, 8, 16)
_CONTEXTS: Final = (512, 2048)
_MORE: Final = (16, 128, 384)
_STEPS: Final = 48


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


def measure_timings(model: ServedModel, folder: Path, *, is_cpu_time: bool = False) -> Timings:
    """Measure once, by time on the wall or of the engine's thread; see ``measure_box``."""
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
            clock = engine_clock() if is_cpu_time else time.monotonic
            return asyncio.run(_measure(engine, clock))
        finally:
            engine.close()


async def _measure(engine: DaemonEngine, clock: Clock) -> Timings:
    found = Timings()
    await ask(engine, _ids(512, 0), "warm", 4)
    for size in _PROMPTS:
        await _measure_prompt(engine, clock, found, size)
    for context in _CONTEXTS:
        for row in range(_BATCHES[-1]):
            await ask(engine, _ids(context, 10 * context + row), f"{context}-{row}", 1)
        for turn, batch in enumerate(_BATCHES):
            await _measure_steps(engine, clock, found, context, batch, turn)
    [view] = [each for each in await engine.sessions.list(TENANT) if each.name == "warm"]
    found.token_bytes = view.size_bytes // view.num_tokens
    return found


async def _measure_prompt(engine: DaemonEngine, clock: Clock, found: Timings, size: int) -> None:
    """Measure a cold prompt, more turns of it, saving them, and turns after they left memory."""
    name, ids = f"prompt-{size}", _ids(size, size)
    heard = await ask(engine, ids, name, 1, clock)
    for (before, began_s), (after, ended_s) in pairwise(heard.pieces):
        work = (0.0, *_piece(after - before, before), 0.0, 0.0)
        found.prompts.append((work, ended_s - began_s))
    done, took_s = heard.pieces[0]
    found.prompts.append(((1.0, *_piece(done, 0), 0.0, 0.0), took_s))
    await _save(engine, clock, found, name, size)
    for is_restored in (False, True):
        for seed, more in enumerate(_MORE):
            ids = (*ids, *heard.tokens, *_ids(more, seed))
            if is_restored:
                await engine.sessions.evict(TENANT, name, "disk")
            heard = await ask(engine, ids, name, 1, clock)
            known = len(ids) - more - 1
            restored = (1.0, float(known)) if is_restored else (0.0, 0.0)
            work = (1.0, *_piece(more + 1, known), *restored)
            found.prompts.append((work, heard.first_s))
            await _save(engine, clock, found, name, more)


async def _save(
    engine: DaemonEngine, clock: Clock, found: Timings, name: str, num_new: int
) -> None:
    began = clock()
    await engine.sessions.persist(TENANT, name)
    found.saves.append(((1.0, float(num_new)), clock() - began))


async def _measure_steps(
    engine: DaemonEngine, clock: Clock, found: Timings, context: int, batch: int, turn: int
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
                clock,
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


def _ids(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(32, 127, (count,), generator=generator).tolist())
