"""GET /metrics: the engine's state, read when Prometheus asks. Names no session and no tenant."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import offload
from offload.daemon.ops.metrics_compat import llamacpp_metrics, vllm_metrics
from offload.daemon.ops.metrics_histograms import RequestMetrics
from offload.daemon.requests import MissReason

if TYPE_CHECKING:
    from offload.daemon.ops.watched_engine import WatchedEngine
    from offload.daemon.sharing.sharing_state import SharingState
    from offload.daemon.state import EngineState

_MISSES: Final[tuple[MissReason, ...]] = (
    *("cold", "diverged", "evicted", "incompatible", "corrupt", "expired"),
)


class EngineCollector(Collector):
    """Turns a snapshot of the engine into metrics.

    Parameters
    ----------
    snapshot : callable
        Returns the engine's state; cheap, on any thread.
    chunk_tokens : int
    compat : iterable of str
        ``vllm`` and ``llamacpp``: whose names to use, next to ours.
    written_today : callable
        Bytes written to disk since midnight, UTC.
    is_reload_good : callable
        Whether the configuration was good when it was read last.
    """

    def __init__(
        self,
        snapshot: "Callable[[], EngineState]",
        chunk_tokens: int,
        compat: Iterable[str],
        written_today: Callable[[], int],
        is_reload_good: Callable[[], bool],
    ) -> None:
        self._snapshot = snapshot
        self._chunk_tokens = chunk_tokens
        self._compat = frozenset(compat)
        self._written_today = written_today
        self._is_reload_good = is_reload_good

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics of this moment."""
        state = self._snapshot()
        yield from _tier_metrics(state)
        yield from _session_metrics(state)
        yield from _saved_metrics(state)
        if state.sharing is not None:
            yield from _sharing_metrics(state.sharing)
        yield _gauge("disk_written_bytes_today", "Since midnight, UTC.", self._written_today())
        good = float(self._is_reload_good())
        yield _gauge("config_last_reload_successful", "1: the last reload was good.", good)
        labels = ["version", "model", "fingerprint"]
        build = GaugeMetricFamily("offload_build_info", "What runs here.", labels=labels)
        build.add_metric([offload.__version__, state.model, state.fingerprint], 1.0)
        yield build
        if "vllm" in self._compat:
            yield from vllm_metrics(state, self._chunk_tokens)
        if "llamacpp" in self._compat:
            yield from llamacpp_metrics(state)


def metrics_router(
    engine: "WatchedEngine",
    compat: Iterable[str],
    written_today: Callable[[], int],
    is_reload_good: Callable[[], bool],
) -> APIRouter:
    """Return the route of ``/metrics``, with a registry of its own.

    Parameters
    ----------
    engine : WatchedEngine
        Its requests are counted from now on.
    compat, written_today, is_reload_good
        As for ``EngineCollector``.
    """
    compat = tuple(compat)
    registry = CollectorRegistry()
    registry.register(
        EngineCollector(
            engine.snapshot, engine.settings.chunk_tokens, compat, written_today, is_reload_good
        )
    )
    if "vllm" in compat:
        requests = RequestMetrics(registry, engine.model.name)
        engine.observers.on_end.append(requests.observe_end)
        engine.observers.on_token_gap.append(requests.observe_gap)
    router = APIRouter(tags=["watching"])

    @router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        started = str(int(engine.snapshot().started_s))
        headers = {"content-type": content_type, "process-start-time-unix": started}
        return Response(encode(registry), headers=headers)

    return router


def _tier_metrics(state: "EngineState") -> Iterator[Metric]:
    for name, text in (
        ("capacity", "It may hold."),
        ("used", "It holds."),
        ("peak", "It has held."),
    ):
        family = GaugeMetricFamily(f"offload_tier_{name}_bytes", text, labels=["tier"])
        for tier in state.tiers:
            family.add_metric([tier.name], getattr(tier, f"{name}_bytes"))
        yield family
    for name, field, text in (
        ("read", "read_bytes", "Read from it, toward the device."),
        ("write", "written_bytes", "Written into it."),
    ):
        counter = CounterMetricFamily(f"offload_tier_{name}_bytes", text, labels=["tier"])
        for tier in state.tiers:
            counter.add_metric([tier.name], getattr(tier, field))
        yield counter
    rates = GaugeMetricFamily(
        "offload_tier_bandwidth_bytes_per_second", "Of the last seconds.", labels=["tier", "op"]
    )
    for tier in state.tiers:
        rates.add_metric([tier.name, "read"], tier.read_bytes_per_s)
        rates.add_metric([tier.name, "write"], tier.written_bytes_per_s)
    yield rates


def _session_metrics(state: "EngineState") -> Iterator[Metric]:
    totals = state.totals
    sessions = GaugeMetricFamily("offload_sessions", "By where they are.", labels=["state"])
    for name in ("running", "device", "host", "disk"):
        sessions.add_metric([name], state.sessions.get(name, 0))
    yield sessions
    yield _counter("session_restores", "Sessions taken up again from disk.", totals.restores)
    yield _counter("session_restored_bytes", "What they held.", totals.restored_bytes)
    yield _counter("session_persists", "Saves of sessions.", totals.persists)
    yield _counter("session_persisted_bytes", "What they wrote.", totals.persisted_bytes)
    yield _counter("session_persist_failures", "Saves that failed.", totals.failed_persists)
    yield _gauge("persistence_ok", "0: the last save failed.", float(state.is_persisting))
    yield _gauge("saved_bytes", "Of all saved sessions.", state.saved_bytes)
    evictions = CounterMetricFamily("offload_evictions", "Moves of idle sessions.", labels=["tier"])
    for tier in ("host", "disk", "none"):
        evictions.add_metric([tier], totals.evictions.get(tier, 0))
    yield evictions
    misses = CounterMetricFamily("offload_miss", "Why no more was known.", labels=["reason"])
    for reason in _MISSES:
        misses.add_metric([reason], totals.misses.get(reason, 0))
    yield misses


def _saved_metrics(state: "EngineState") -> Iterator[Metric]:
    totals = state.totals
    yield _counter("prefill_tokens_saved", "Prompt tokens that were known.", totals.cached.total)
    yield _counter("prefill_seconds_saved", "What they would have taken.", totals.prefill_s_saved)
    yield _counter("requests_failed", "Requests that ended with an error.", totals.failed)


def _sharing_metrics(sharing: "SharingState") -> Iterator[Metric]:
    up = float(sharing.is_reachable)
    yield _gauge("sharing_reachable", "0: the object store has failed.", up)
    yield _gauge("sharing_held_sessions", "That only this daemon may write.", sharing.num_held)
    left = sharing.num_unpublished
    yield _gauge("sharing_unpublished_sessions", "Used, or not published yet.", left)
    for name, text in (
        ("publications", "Sessions published."),
        ("published_bytes", "Uploaded, as stored."),
        ("fetches", "Sessions fetched."),
        ("fetched_bytes", "Downloaded, as stored."),
        ("failures", "Of the object store, or of a save for it."),
        ("lost_leases", "Sessions that another daemon took over while they were used here."),
    ):
        yield _counter(f"sharing_{name}", text, getattr(sharing, name))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"offload_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"offload_{name}", text, value=value)
