"""A replica is killed amid an answer; its session goes on at another, and then at itself again."""

import asyncio
import json
from pathlib import Path

import pytest

from offload.daemon.errors import SessionBusy
from tests.support.daemon import greedy, tiny
from tests.support.replicas import (
    LEASE_S,
    ask,
    at_rest,
    put_clock_forward,
    replica,
    sharing_of,
)
from tests.support.sharing_victim import SESSION, victim

DOCUMENT = [3 + i * 31 % 90 for i in range(60)]


def killed_amid_an_answer(folder: Path) -> list[int]:
    """Return the tokens that a replica has told before it was killed; it had published some."""
    told: list[int] = []
    with victim(folder, "a", DOCUMENT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            token, publications = json.loads(line)
            told.append(token)
            if publications >= 2 and len(told) >= 20:
                process.kill()
                break
    return told


def test_session_of_a_killed_replica_goes_on_at_another_when_the_lease_ends(
    tmp_path: Path,
) -> None:
    async def go_on() -> list[int]:
        with pytest.raises(SessionBusy) as caught:
            await ask(there, ids, session=SESSION)
        assert 0 < caught.value.retry_after_s <= LEASE_S / 2
        put_clock_forward(there, LEASE_S + 1.0)
        reply = await ask(there, ids, session=SESSION)
        assert reply.tokens == greedy(tiny(), ids, 8)
        assert reply.num_cached >= len(DOCUMENT)
        assert reply.started.cached.remote == reply.num_cached
        await at_rest(there)
        return [*ids, *reply.tokens, 5]

    with replica(tmp_path, "b") as there:
        ids = [*DOCUMENT, *killed_amid_an_answer(tmp_path)]
        longer = asyncio.run(go_on())
    with replica(tmp_path, "a") as again:
        reply = asyncio.run(ask(again, longer, session=SESSION))
        assert sharing_of(again).fetches == 1

    assert reply.tokens == greedy(tiny(), longer, 8)
    assert reply.num_cached == len(longer) - 2
