"""The state of the engine, copied for other threads."""

import logging
import time
from collections import Counter, deque
from dataclasses import replace

from offload.daemon.engine_settings import EngineSettings
from offload.daemon.served_model import ServedModel
from offload.daemon.state import TIER_NAMES, EngineState, TierState
from offload.daemon.work.parts import Parts
from offload.daemon.work.session_views import state_of
from offload.engine import Engine
from offload.errors import OffloadError

_LOG = logging.getLogger(__name__)

_PERIOD_S = 0.1
_COUNT_S = 60.0
_WINDOW_S = 5.0
"""Over which bandwidths are measured."""


class Publisher:
    """Makes an ``EngineState`` now and then. ``publish`` is for the engine's thread.

    Parameters
    ----------
    model : ServedModel
    settings : EngineSettings
    parts : Parts
    """

    def __init__(self, model: ServedModel, settings: EngineSettings, parts: Parts) -> None:
        self._model = model
        self._parts = parts
        self._started_s = time.time()
        self._next_s = 0.0
        self._next_count_s = 0.0
        self._num_unloaded, self._saved_bytes = 0, 0
        self._history: deque[tuple[float, tuple[TierState, ...]]] = deque()
        self._state = self._make()

    def publish(self, *, is_forced: bool = False) -> None:
        """Make a new state, if the last is old or ``is_forced``."""
        now = time.monotonic()
        if is_forced or now >= self._next_s:
            self._next_s = now + _PERIOD_S
            self._state = self._make()

    def state(self, num_taken: int, *, is_ready: bool, is_draining: bool) -> EngineState:
        """Return the last state; ``num_taken`` requests run or wait now. Any thread may call."""
        state = self._state
        return replace(
            state,
            is_ready=is_ready,
            is_draining=is_draining,
            num_waiting=max(0, num_taken - state.num_running),
        )

    def _make(self) -> EngineState:
        parts, scheduler = self._parts, self._parts.scheduler
        sessions = Counter(state_of(session) for session in parts.book)
        if time.monotonic() >= self._next_count_s:
            self._count_saved(sum(session.saved is not None for session in parts.book))
        sessions["disk"] += self._num_unloaded
        return EngineState(
            model=self._model.name,
            fingerprint=self._model.fingerprint,
            started_s=self._started_s,
            is_ready=False,
            is_draining=False,
            is_persisting=parts.persistence.is_working,
            num_running=len(scheduler.running),
            num_prefilling=scheduler.num_prefilling,
            num_waiting=len(scheduler.waiting),
            tiers=self._tiers(),
            totals=parts.tally.totals(),
            sessions={name: sessions[name] for name in ("running", "device", "host", "disk")},
            saved_bytes=self._saved_bytes,
        )

    def _count_saved(self, num_loaded: int) -> None:
        """Count what all tenants have saved: those of whom nothing was heard yet, too."""
        self._next_count_s = time.monotonic() + _COUNT_S
        try:
            number, self._saved_bytes = self._parts.stores.count()
        except OffloadError as error:
            _LOG.warning("saved sessions are not counted now: %s", error)
            return
        self._num_unloaded = max(0, number - num_loaded)

    def _tiers(self) -> tuple[TierState, ...]:
        now = time.monotonic()
        found = tuple(
            _tier(self._parts.engine, level) for level in range(len(self._parts.engine.tiers))
        )
        self._history.append((now, found))
        while now - self._history[0][0] > _WINDOW_S and len(self._history) > 2:
            self._history.popleft()
        then, before = self._history[0]
        seconds = now - then
        if seconds <= 0:
            return found
        return tuple(
            replace(
                tier,
                read_bytes_per_s=(tier.read_bytes - old.read_bytes) / seconds,
                written_bytes_per_s=(tier.written_bytes - old.written_bytes) / seconds,
            )
            for tier, old in zip(found, before, strict=True)
        )


def _tier(engine: Engine, level: int) -> TierState:
    tier, counters = engine.tiers[level], engine.counters
    beside = engine.beside_chunks_bytes(tier.name)
    return TierState(
        name=TIER_NAMES[tier.name],
        capacity_bytes=engine.config.capacities[tier.name],
        used_bytes=tier.used_bytes + beside,
        peak_bytes=engine.peak_bytes(level),
        read_bytes=counters.loaded_bytes.get(tier.name, 0),
        written_bytes=counters.stored_bytes.get(tier.name, 0),
    )
