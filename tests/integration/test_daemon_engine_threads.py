"""The engine on its own thread, asked from an event loop."""

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from offload.daemon.engine import DaemonEngine
from offload.daemon.errors import Draining
from offload.daemon.requests import (
    Finished,
    GenerationRequest,
    PrefillProgress,
    Sampling,
    Started,
    Token,
)
from tests.support.daemon import greedy, request, settings_in, tiny

R = TypeVar("R")

DOCUMENT = [3 + i * 31 % 90 for i in range(100)]
ENDLESS = Sampling(temperature=0.0, ignore_eos=True)

pytestmark = pytest.mark.leaks


def run(work: Coroutine[Any, Any, R]) -> R:
    return asyncio.run(work)


def start(path: Path, **changes: Any) -> DaemonEngine:
    engine = DaemonEngine(tiny(), settings_in(path, **changes))
    engine.start()
    return engine


async def tokens_of(engine: DaemonEngine, asked: GenerationRequest) -> list[int]:
    events = engine.generate(asked)
    return [event.token_id async for event in events if isinstance(event, Token)]


def test_many_clients_get_their_own_answers(tmp_path: Path) -> None:
    prompts = [DOCUMENT[start : start + 20 + start] for start in range(12)]

    async def ask() -> list[list[int]]:
        return await asyncio.gather(
            *(tokens_of(engine, request(ids, tenant=f"t{i % 3}")) for i, ids in enumerate(prompts))
        )

    engine = start(tmp_path, max_running=4)
    found = run(ask())
    engine.close()

    assert found == [greedy(tiny(), ids, 8) for ids in prompts]


def test_client_that_stops_listening_is_gone_and_its_work_is_kept(tmp_path: Path) -> None:
    async def ask() -> Started:
        events = engine.generate(request(DOCUMENT, session="chat", sampling=ENDLESS))
        async for event in events:
            if isinstance(event, PrefillProgress) and event.num_done >= 32:
                break
        await events.aclose()
        again = [event async for event in engine.generate(request(DOCUMENT, session="chat"))]
        assert isinstance(again[0], Started)
        return again[0]

    engine = start(tmp_path)
    started = run(ask())
    state = engine.snapshot()
    engine.close()

    assert started.cached.total >= 32
    assert state.totals.cancelled == 1
    assert state.num_running == state.num_waiting == 0


def test_cancelled_task_is_gone(tmp_path: Path) -> None:
    async def ask() -> None:
        first = asyncio.Event()

        async def listen() -> None:
            async for event in engine.generate(request(DOCUMENT[:20], sampling=ENDLESS)):
                if isinstance(event, Token):
                    first.set()

        task = asyncio.create_task(listen())
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.sessions.list("ann")  # a turn later

    engine = start(tmp_path)
    run(ask())
    assert engine.snapshot().totals.cancelled == 1
    engine.close()


def test_drain_ends_what_runs_saves_all_and_takes_no_more(tmp_path: Path) -> None:
    async def ask() -> list[Any]:
        seen: list[Any] = []
        first = asyncio.Event()

        async def listen() -> None:
            asked = request(DOCUMENT[:20], session="chat", sampling=ENDLESS)
            async for event in engine.generate(asked):
                seen.append(event)
                first.set()

        task = asyncio.create_task(listen())
        await first.wait()
        await engine.drain(0.0)
        await task
        assert engine.is_draining
        assert engine.is_alive
        assert not engine.is_ready
        with pytest.raises(Draining):
            await tokens_of(engine, request(DOCUMENT[:5]))
        [view] = await engine.sessions.list("ann")
        assert view.dirty_tokens == 0
        return seen

    engine = start(tmp_path)
    seen = run(ask())
    engine.close()

    assert isinstance(seen[-1], Finished)
    assert seen[-1].reason in ("cancelled", "length")
    assert not engine.is_alive


def test_close_ends_requests_with_an_error(tmp_path: Path) -> None:
    async def ask() -> None:
        events = engine.generate(request(DOCUMENT[:20], sampling=ENDLESS))
        await anext(events)
        await asyncio.to_thread(engine.close)
        error: Draining | None = None
        try:
            async for _ in events:
                continue
        except Draining as raised:
            error = raised
        assert error is not None
        with pytest.raises(Draining):
            await engine.sessions.list("ann")

    engine = start(tmp_path, max_context_tokens=1 << 20)
    run(ask())


def test_engine_that_was_never_started_is_closed(tmp_path: Path) -> None:
    engine = DaemonEngine(tiny(), settings_in(tmp_path))

    assert not engine.is_alive
    engine.close()


def test_observers_hear_of_every_end_before_the_client(tmp_path: Path) -> None:
    heard: list[tuple[Finished, GenerationRequest, str]] = []
    engine = start(tmp_path)
    engine.on_finished(
        lambda event, asked: heard.append((event, asked, threading.current_thread().name))
    )
    asked = request(DOCUMENT[:20])

    async def ask() -> Any:
        events = [event async for event in engine.generate(asked)]
        assert len(heard) == 1
        return events[-1]

    last = run(ask())
    engine.close()

    assert heard == [(last, asked, "offload-daemon-engine")]


def test_prefetch_and_archive_through_the_service(tmp_path: Path) -> None:
    async def ask() -> None:
        await tokens_of(engine, request(DOCUMENT, session="chat"))
        await engine.sessions.evict("ann", "chat", "disk")
        view = await engine.sessions.prefetch("ann", "chat")
        assert view.tokens.disk == 0
        await engine.sessions.export("ann", "chat", tmp_path / "chat.kv")
        view = await engine.sessions.import_("ann", "back", tmp_path / "chat.kv")
        assert view.num_tokens == 107
        names = [each.name for each in await engine.sessions.list("ann")]
        assert names == ["back", "chat"]

    engine = start(tmp_path / "data")
    run(ask())
    engine.close()
