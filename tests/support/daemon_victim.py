"""A process with an engine that answers three sessions at once, until it is killed.

Started as a module with a folder and the prompts, as JSON; says every token on standard output, and
how many times it has saved.
"""

import asyncio
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offload.daemon.engine import DaemonEngine
from offload.daemon.requests import Sampling, Token
from tests.support.daemon import request, settings_in, tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

PERSIST_INTERVAL_S = 0.02
MAX_TOKENS = 400


@contextmanager
def victim(folder: Path, prompts: dict[str, list[int]]) -> "Iterator[subprocess.Popen[str]]":
    """Start the process; it is killed at the end, if it has not been before."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.daemon_victim", str(folder), json.dumps(prompts)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


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
    await asyncio.Event().wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(_main(Path(sys.argv[1]), json.loads(sys.argv[2])))
