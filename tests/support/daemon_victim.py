"""A process with an engine that answers three sessions at once, until it is killed.

Started as a module with a folder and the prompts, as JSON; says every token on standard output, and
how many times it has saved.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import torch

from offload.daemon.engine import DaemonEngine
from offload.daemon.requests import Sampling, Token
from offload.daemon.work import housekeeping
from tests.support.daemon import request, settings_in, tiny
from tests.support.victims import Victim, victim_of

PERSIST_INTERVAL_S = 0.02
PERIOD_S = 0.03
"""Between two looks for what is to be saved: many of them in the second that the answers take."""

MAX_TOKENS = 400


def victim(folder: Path, prompts: dict[str, list[int]]) -> Victim:
    """Start the process; it is killed at the end, if it has not been before."""
    return victim_of("tests.support.daemon_victim", str(folder), json.dumps(prompts))


async def _answer(engine: DaemonEngine, name: str, ids: list[int]) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    async for event in engine.generate(request(ids, session=name, sampling=sampling)):
        if isinstance(event, Token):
            persists = engine.snapshot().totals.persists
            print(json.dumps([name, event.token_id, persists]), flush=True)


async def _main(folder: Path, prompts: dict[str, list[int]]) -> None:
    settings = settings_in(folder, persist_interval_s=PERSIST_INTERVAL_S)
    engine = DaemonEngine(tiny(), settings)
    engine.start()
    await asyncio.gather(*(_answer(engine, name, ids) for name, ids in prompts.items()))
    os._exit(0)  # as suddenly as if it had been killed


if __name__ == "__main__":
    torch.set_num_threads(1)
    housekeeping._PERIOD_S = PERIOD_S
    asyncio.run(_main(Path(sys.argv[1]), json.loads(sys.argv[2])))
