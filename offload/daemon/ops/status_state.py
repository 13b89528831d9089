"""What the status page and ``offload ps`` show: one JSON object, made at most once a second."""

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING, Any, Final

from offload.daemon.errors import DaemonError
from offload.daemon.state import SessionView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from offload.daemon.ops.status_wear import DiskWear
    from offload.daemon.ops.watched_engine import RequestRecord, WatchedEngine
    from offload.daemon.state import EngineState

_FRESH_S: Final = 0.9
_MAX_SESSIONS: Final = 500
"""Of all tenants, the most recently used; a page shows no more."""


class StatusFeed:
    """Makes the state that everybody who watches is shown. One event loop.

    Parameters
    ----------
    engine : WatchedEngine
    tenants : callable
        Names of all tenants.
    wear : DiskWear
    write_budget : callable
        Bytes a day, or None; a reload may change it.
    """

    def __init__(
        self,
        engine: "WatchedEngine",
        tenants: "Callable[[], Iterable[str]]",
        wear: "DiskWear",
        write_budget: "Callable[[], int | None]",
    ) -> None:
        self._engine = engine
        self._tenants = tenants
        self._wear = wear
        self._write_budget = write_budget
        self._lock = asyncio.Lock()
        self._made_s = float("-inf")
        self._state: dict[str, Any] = {}

    async def current(self) -> dict[str, Any]:
        """Return the state, as plain values, at most a second old."""
        async with self._lock:
            if time.monotonic() - self._made_s > _FRESH_S:
                self._state = await self._make()
                self._made_s = time.monotonic()
            return self._state

    def expire(self) -> None:
        """Have the state made again, because somebody changed something."""
        self._made_s = float("-inf")

    def written_today(self) -> int:
        """Return the bytes written to disk since midnight, UTC."""
        return self._wear.update(written_bytes(self._engine.snapshot()))

    async def _make(self) -> dict[str, Any]:
        engine = self._engine
        state = dataclasses.asdict(engine.snapshot())
        sessions = [
            {"tenant": tenant} | dataclasses.asdict(view)
            for tenant in self._tenants()
            for view in await self._list(tenant)
        ]
        sessions.sort(key=lambda session: session["last_used_s"], reverse=True)
        state["session_counts"] = state.pop("sessions")
        return {
            "now_s": time.time(),
            **state,
            "requests": [request_state(record) for record in engine.requests],
            "num_sessions": len(sessions),
            "sessions": sessions[:_MAX_SESSIONS],
            "written_today_bytes": self.written_today(),
            "write_budget_bytes": self._write_budget(),
        }

    async def _list(self, tenant: str) -> list[SessionView]:
        try:
            return await self._engine.sessions.list(tenant)
        except DaemonError:  # the engine has gone; the rest of the state says so
            return []


def written_bytes(state: "EngineState") -> int:
    """Return what was written to disk since the start, by the disk tier and by saves."""
    spilled = sum(tier.written_bytes for tier in state.tiers if tier.name == "disk")
    return spilled + state.totals.persisted_bytes


def request_state(record: "RequestRecord") -> dict[str, Any]:
    """Return what is shown of a request under way; nothing of its text."""
    started = record.started
    return {
        "request_id": record.request.request_id,
        "tenant": record.request.tenant,
        "session": record.session,
        "phase": record.phase,
        "age_s": time.monotonic() - record.asked_s,
        "num_prompt_tokens": len(record.request.token_ids),
        "num_done": record.num_done,
        "num_cached": 0 if started is None else started.cached.total,
        "num_generated": record.num_generated,
    }
