"""A process with an engine that shares the session it answers, until it is killed.

Started as a module with a folder, the name of a replica and the prompt, as JSON; says every token
on standard output, and how many times it has published.
"""

import asyncio
import json
import sys
from pathlib import Path

import torch

from offload.daemon.requests import Token
from tests.support.daemon import request, sampled
from tests.support.replicas import replica, sharing_of
from tests.support.victims import Victim, victim_of

SESSION = "chat"
_PUBLISH_INTERVAL_S = 0.01
_MAX_TOKENS = 4000


def victim(folder: Path, name: str, ids: list[int]) -> Victim:
    """Start the process; it is killed at the end, if it has not been before."""
    return victim_of("tests.support.sharing_victim", str(folder), name, json.dumps(ids))


async def _main(folder: Path, name: str, ids: list[int]) -> None:
    asked = request(ids, session=SESSION, sampling=sampled(max_tokens=_MAX_TOKENS))
    with replica(folder, name, persist_interval_s=_PUBLISH_INTERVAL_S) as engine:
        async for event in engine.generate(asked):
            if isinstance(event, Token):
                publications = sharing_of(engine).publications
                print(json.dumps([event.token_id, publications]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(_main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])))
