"""Daemons that share their sessions: each with a data path of its own, on one folder."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.daemon.engine import DaemonEngine
from offload.daemon.requests import Event, Finished, Started, Token
from offload.daemon.sharing.sharing_settings import SharingSettings
from offload.daemon.sharing.sharing_state import SharingState
from tests.support.daemon import request, sampled, settings_in, tiny

LEASE_S = 60.0


@dataclass(frozen=True)
class Reply:
    """What came of one request."""

    started: Started
    tokens: list[int]

    @property
    def num_cached(self) -> int:
        return self.started.cached.total


def sharing_in(folder: Path, lease_s: float = LEASE_S, **changes: Any) -> SharingSettings:
    url = (folder / "bucket").as_uri()
    return SharingSettings(url, folder / "secret", lease_s, **changes)


@contextmanager
def replicas(
    folder: Path, names: Sequence[str] = "ab", lease_s: float = LEASE_S, **changes: Any
) -> Iterator[list[DaemonEngine]]:
    """Run engines, each on its thread, that share the folder ``bucket``."""
    with ExitStack() as stack:
        yield [stack.enter_context(replica(folder, name, lease_s, **changes)) for name in names]


@contextmanager
def replica(
    folder: Path,
    name: str,
    lease_s: float = LEASE_S,
    wait_s: float = 0.0,
    is_required: bool = False,
    **changes: Any,
) -> Iterator[DaemonEngine]:
    (folder / "bucket").mkdir(exist_ok=True)
    sharing = sharing_in(folder, lease_s, wait_s=wait_s, is_required=is_required)
    engine = DaemonEngine(tiny(), settings_in(folder / name, sharing=sharing, **changes))
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


async def ask(engine: DaemonEngine, ids: Sequence[int], **changes: Any) -> Reply:
    events: list[Event] = [event async for event in engine.generate(request(ids, **changes))]
    [started] = [event for event in events if isinstance(event, Started)]
    return Reply(started, [event.token_id for event in events if isinstance(event, Token)])


async def at_rest(engine: DaemonEngine) -> None:
    """Wait until everything is published that requests which have ended have left."""
    assert engine._sharing is not None
    await asyncio.to_thread(engine._sharing.drain, 30.0)


def sharing_of(engine: DaemonEngine) -> SharingState:
    state = engine.snapshot().sharing
    assert state is not None
    return state


def put_clock_forward(engine: DaemonEngine, seconds: float) -> None:
    """Have leases of tenant ``ann`` end sooner for one replica."""
    assert engine._sharing is not None
    leases = engine._sharing._exchange._remotes.of("ann")._leases
    leases._clock = lambda: time.time() + seconds


class Held:
    """A request that has begun and does not end before it is told to."""

    def __init__(self, engine: DaemonEngine, ids: Sequence[int], session: str) -> None:
        endless = sampled(max_tokens=4000)
        self._events = engine.generate(request(ids, session=session, sampling=endless))
        self._tokens: list[int] = []

    async def finish(self) -> list[int]:
        """Return the tokens that it has by now, and 30 at least."""
        async for event in self._events:
            if isinstance(event, Token):
                self._tokens.append(event.token_id)
            if isinstance(event, Finished) or len(self._tokens) >= 30:
                break
        await self._events.aclose()
        return self._tokens

    async def __aenter__(self) -> "Held":
        async for event in self._events:
            if isinstance(event, Token):
                self._tokens.append(event.token_id)
                break
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self._events.aclose()
