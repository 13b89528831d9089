"""Daemons that share their sessions over an object store."""

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from offload.daemon.engine import DaemonEngine
from offload.daemon.errors import SessionBusy, UnknownSession
from offload.daemon.sharing.entry import Entry
from offload.errors import ConfigError, StorageError
from tests.support.daemon import greedy, tiny
from tests.support.replicas import (
    LEASE_S,
    Held,
    Reply,
    ask,
    at_rest,
    put_clock_forward,
    replica,
    replicas,
    sharing_of,
)

DOCUMENT = [3 + i * 31 % 90 for i in range(100)]

pytestmark = pytest.mark.leaks


def test_session_that_moves_to_and_fro_is_known_wherever_it_goes(tmp_path: Path) -> None:
    async def talk() -> None:
        ids = DOCUMENT[:60]
        for turn in range(5):
            engine = engines[turn % 2]
            reply = await ask(engine, ids, session="chat")
            await at_rest(engine)
            assert reply.tokens == greedy(tiny(), ids, 8)
            assert reply.num_cached == (len(ids) - 4 if turn else 0)
            assert reply.started.cached.remote > 0 or not turn
            ids = ids + reply.tokens + DOCUMENT[turn : turn + 3]

    with replicas(tmp_path) as engines:
        asyncio.run(talk())
        assert [sharing_of(engine).publications for engine in engines] == [3, 2]
        assert [sharing_of(engine).fetches for engine in engines] == [2, 2]
        assert [sharing_of(engine).num_held for engine in engines] == [0, 0]


def test_session_that_stays_is_not_fetched(tmp_path: Path) -> None:
    async def talk() -> Reply:
        await ask(engine, DOCUMENT[:40], session="chat")
        await at_rest(engine)
        return await ask(engine, DOCUMENT[:60], session="chat")

    with replica(tmp_path, "a") as engine:
        reply = asyncio.run(talk())
        assert reply.started.cached.device >= 32
        assert sharing_of(engine).fetches == 0


def test_session_of_a_replica_that_was_started_again_is_not_fetched(tmp_path: Path) -> None:
    with replica(tmp_path, "a") as engine:
        asyncio.run(ask(engine, DOCUMENT[:40], session="chat"))
    with replica(tmp_path, "a") as engine:
        reply = asyncio.run(ask(engine, DOCUMENT[:60], session="chat"))
        assert reply.started.cached.disk >= 32
        assert sharing_of(engine).fetches == 0


def test_session_in_use_is_refused_elsewhere_and_had_after_its_end(tmp_path: Path) -> None:
    async def talk() -> None:
        async with Held(here, DOCUMENT[:40], "chat") as held:
            with pytest.raises(SessionBusy) as caught:
                await ask(there, DOCUMENT[:50], session="chat")
            assert 0 < caught.value.retry_after_s <= 30.0
            assert sharing_of(here).num_held == 1
            ids = DOCUMENT[:40] + await held.finish()
        await at_rest(here)
        reply = await ask(there, [*ids, 7], session="chat")
        assert reply.num_cached >= len(ids) - 1
        assert reply.tokens == greedy(tiny(), [*ids, 7], 8)

    with replicas(tmp_path) as (here, there):
        asyncio.run(talk())


def test_request_waits_for_a_session_that_another_is_about_to_publish(tmp_path: Path) -> None:
    async def talk() -> Reply:
        async with Held(here, DOCUMENT[:40], "chat") as held:
            asked = asyncio.create_task(ask(there, DOCUMENT[:60], session="chat"))
            await held.finish()
        return await asked

    with replicas(tmp_path, wait_s=60.0) as (here, there):
        assert asyncio.run(talk()).num_cached == 40


def test_two_that_make_a_session_at_once_are_one_owner_and_one_conflict(tmp_path: Path) -> None:
    async def make(
        engine: DaemonEngine, has_begun: asyncio.Event, other_was_refused: asyncio.Event
    ) -> object:
        async with Held(engine, DOCUMENT[:40], "chat") as held:
            has_begun.set()
            await other_was_refused.wait()
            return await held.finish()

    async def talk() -> list[object]:
        has_begun, was_refused = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(make(each, has_begun, was_refused)) for each in engines]
        await has_begun.wait()
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1
        was_refused.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with replicas(tmp_path) as engines:
        found = asyncio.run(talk())

    assert sorted(type(each).__name__ for each in found) == ["SessionBusy", "list"]


def test_stale_owner_is_fenced_and_the_name_follows_the_store(tmp_path: Path) -> None:
    ids = DOCUMENT[:40]

    async def talk() -> None:
        async with Held(stale, ids, "chat") as held:
            put_clock_forward(there, LEASE_S + 1.0)
            reply = await ask(there, DOCUMENT[:60], session="chat")
            await at_rest(there)
            tokens = await held.finish()
        await at_rest(stale)
        assert tokens[:30] == greedy(tiny(), ids, 30)  # what it had begun ends as it should
        assert sharing_of(stale).lost_leases == 1
        names = [view.name for view in await stale.sessions.list("ann") if view.state != "remote"]
        assert len(names) == 1
        assert names[0].startswith("s-")
        again = await ask(stale, DOCUMENT[:60] + reply.tokens + [5], session="chat")
        assert again.num_cached == 67
        assert sharing_of(stale).fetches == 1

    with replicas(tmp_path) as (stale, there):
        asyncio.run(talk())


def test_tenants_never_see_each_others_sessions(tmp_path: Path) -> None:
    async def talk() -> None:
        await ask(here, DOCUMENT[:40], session="chat")
        await at_rest(here)
        reply = await ask(there, DOCUMENT[:40], session="chat", tenant="bob")
        assert reply.num_cached == 0
        await at_rest(there)
        assert [view.name for view in await there.sessions.list("carl")] == []
        with pytest.raises(UnknownSession):
            await there.sessions.get("carl", "chat")
        assert sharing_of(there).fetches == 0

    with replicas(tmp_path) as (here, there):
        asyncio.run(talk())
    prefixes = [path for path in (tmp_path / "bucket").iterdir() if list(path.rglob("*.json"))]
    assert len(prefixes) == 2


def test_session_with_a_salt_is_known_elsewhere_to_who_has_the_salt(tmp_path: Path) -> None:
    async def talk() -> list[int]:
        await ask(here, DOCUMENT[:40], session="chat", cache_salt="pepper")
        await at_rest(here)
        known = await ask(there, DOCUMENT[:50], session="chat", cache_salt="pepper")
        await at_rest(there)
        unknown = await ask(here, DOCUMENT[:50], session="chat", cache_salt="sugar")
        return [known.num_cached, unknown.num_cached]

    with replicas(tmp_path) as (here, there):
        assert asyncio.run(talk()) == [40, 0]


def test_session_deleted_at_one_replica_is_gone_at_all(tmp_path: Path) -> None:
    async def talk() -> None:
        await ask(here, DOCUMENT[:40], session="chat")
        await at_rest(here)
        await there.sessions.delete("ann", "chat")
        assert [view.name for view in await there.sessions.list("ann")] == []
        assert [view.name for view in await here.sessions.list("ann")] == []
        with pytest.raises(UnknownSession):
            await here.sessions.delete("ann", "chat")
        reply = await ask(here, DOCUMENT[:40], session="chat")
        assert reply.num_cached == 0

    with replicas(tmp_path) as (here, there):
        asyncio.run(talk())


def test_session_of_another_replica_is_listed_forked_and_kept(tmp_path: Path) -> None:
    async def talk() -> None:
        first = await ask(here, DOCUMENT[:40], session="chat")
        await at_rest(here)
        [view] = await there.sessions.list("ann")
        assert (view.name, view.state, view.tokens.remote) == ("chat", "remote", 47)
        assert (await there.sessions.get("ann", "chat")).num_requests == 1
        view = await there.sessions.update("ann", "chat", ttl_s=1000.0)
        copy = await there.sessions.fork("ann", "chat", "copy")
        assert (copy.num_tokens, copy.parent) == (47, "chat")
        await at_rest(there)
        reply = await ask(here, DOCUMENT[:40] + first.tokens + [5], session="copy")
        assert reply.num_cached == 47
        assert (await here.sessions.get("ann", "copy")).ttl_s == 1000.0

    with replicas(tmp_path) as (here, there):
        asyncio.run(talk())


def test_request_without_a_name_does_not_add_to_a_session_that_has_one(tmp_path: Path) -> None:
    async def talk() -> None:
        first = await ask(engine, DOCUMENT[:40], session="chat")
        reply = await ask(engine, DOCUMENT[:40] + first.tokens + [5])
        assert reply.num_cached == 47
        assert reply.started.session not in (None, "chat")
        assert (await engine.sessions.get("ann", "chat")).num_tokens == 47

    with replica(tmp_path, "a") as engine:
        asyncio.run(talk())


@pytest.mark.parametrize("is_required", [False, True])
def test_store_that_is_away_is_done_without_unless_it_is_required(
    tmp_path: Path, is_required: bool
) -> None:
    bucket = tmp_path / "bucket"

    async def talk() -> None:
        reply = await ask(here, DOCUMENT[:40], session="chat")
        await at_rest(here)
        bucket.rename(tmp_path / "away")
        bucket.write_text("no folder")
        if is_required:
            with pytest.raises(StorageError):
                await ask(here, DOCUMENT[:60], session="chat")
            return
        ids = DOCUMENT[:40] + reply.tokens + [5]
        reply = await ask(here, ids, session="chat")
        assert reply.num_cached == 47
        assert reply.tokens == greedy(tiny(), ids, 8)
        assert sharing_of(here).failures > 0
        assert not sharing_of(here).is_reachable
        bucket.unlink()
        (tmp_path / "away").rename(bucket)
        await at_rest(here)
        assert sharing_of(here).is_reachable
        assert sharing_of(here).num_unpublished == 0
        again = await ask(there, ids + reply.tokens + [6], session="chat")
        assert again.num_cached == len(ids) + 7

    with replicas(tmp_path, is_required=is_required) as (here, there):
        asyncio.run(talk())


@pytest.mark.parametrize("is_asked_late", [False, True])
def test_turn_that_ends_while_the_one_before_is_published_is_published_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_asked_late: bool
) -> None:
    uploaded, second_runs, second_ended = (threading.Event() for _ in range(3))
    answers: list[bool] = []

    def slowed(entry: Entry, may_release: Callable[[], bool]) -> bool:
        def ask_late() -> bool:
            uploaded.set()
            assert (second_ended if is_asked_late else second_runs).wait(30.0)
            answers.append(may_release())
            assert second_ended.wait(30.0)
            return answers[-1]

        return publish(entry, ask_late)

    async def talk() -> None:
        first = await ask(here, DOCUMENT[:40], session="chat")
        await asyncio.to_thread(uploaded.wait, 30.0)
        ids = DOCUMENT[:40] + first.tokens + [5]
        async with Held(here, ids, "chat") as held:
            second_runs.set()
            ids += await held.finish()
        await here.sessions.list("ann")  # a turn later
        second_ended.set()
        await at_rest(here)
        reply = await ask(there, [*ids, 5], session="chat")
        assert reply.num_cached >= len(ids) - 1
        assert answers == [False, True]

    with replicas(tmp_path) as (here, there):
        assert here._sharing is not None
        publish = here._sharing._exchange.publish
        monkeypatch.setattr(here._sharing._exchange, "publish", slowed)
        asyncio.run(talk())


def test_drain_publishes_what_requests_had_when_they_were_ended(tmp_path: Path) -> None:
    async def drained() -> list[int]:
        async with Held(here, DOCUMENT[:40], "chat") as held:
            await here.drain(0.0)
            return [*DOCUMENT[:40], *await held.finish()]

    with replicas(tmp_path) as (here, there):
        ids = asyncio.run(drained())
        here.close()
        reply = asyncio.run(ask(there, [*ids, 5], session="chat"))
    assert reply.num_cached >= 40


def test_damaged_session_is_computed_again_and_written_anew(tmp_path: Path) -> None:
    async def talk() -> None:
        await ask(here, DOCUMENT[:40], session="chat")
        await at_rest(here)
        for block in (tmp_path / "bucket").glob("*/blocks/**/*-0"):
            content = bytearray(block.read_bytes())
            content[-1] ^= 1
            block.write_bytes(content)
        reply = await ask(there, DOCUMENT[:60], session="chat")
        assert reply.num_cached == 0
        assert reply.tokens == greedy(tiny(), DOCUMENT[:60], 8)
        await at_rest(there)
        again = await ask(third, DOCUMENT[:80], session="chat")
        assert again.num_cached == 56  # whole chunks

    with replicas(tmp_path, "abc") as (here, there, third):
        asyncio.run(talk())


def test_another_secret_for_what_is_saved_is_refused(tmp_path: Path) -> None:
    with replica(tmp_path, "a"):
        pass
    (tmp_path / "secret").unlink()
    with pytest.raises(ConfigError, match="not the secret"), replica(tmp_path, "a"):
        pass


def test_many_sessions_that_wander_at_random_are_always_right(tmp_path: Path) -> None:
    chance = random.Random(0)

    async def wander(name: str, start: int) -> int:
        ids, known = DOCUMENT[start : start + 30], 0
        for _ in range(6):
            engine = chance.choice(engines)
            reply = await ask(engine, ids, session=name)
            expected = await asyncio.to_thread(greedy, tiny(), ids, 8)
            assert reply.tokens == expected
            known += reply.num_cached
            ids = ids + reply.tokens + [3 + start]
        return known

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(wander(f"chat-{i}", 5 * i) for i in range(8)))

    with replicas(tmp_path, wait_s=60.0) as engines:
        known = asyncio.run(all_of_them())
        assert all(sharing_of(engine).lost_leases == 0 for engine in engines)
    assert known == [sum(28 + 9 * turn for turn in range(1, 6))] * 8  # all but what was just said
