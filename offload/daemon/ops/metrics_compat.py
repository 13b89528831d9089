"""The engine's state under the names of vLLM and llama.cpp, which dashboards and routers know.

Only what we can say truly: names that have no counterpart here are left out.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from offload.daemon.state import EngineState, TierState


def vllm_metrics(state: "EngineState", chunk_tokens: int) -> Iterator[Metric]:
    """Yield what vLLM 0.33 calls ``vllm:…``, and what it used to, for older scrapers.

    A prefix that was found on the device is a hit of its prefix cache; one on host or disk is a hit
    of its "external" one.
    """
    totals, cached = state.totals, state.totals.cached
    usage = _usage(_device(state))
    yield _gauge(state, "num_requests_running", "Being computed.", state.num_running)
    yield _gauge(state, "num_requests_waiting", "Waiting.", state.num_waiting)
    yield _by(
        state, "num_requests_waiting_by_reason", "Waiting.", "reason",
        {"capacity": state.num_waiting, "deferred": 0},
    )  # fmt: skip
    for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
        yield _gauge(state, name, "Share of the device tier that is used.", usage)
    for prefix in ("prefix_cache", "gpu_prefix_cache"):
        yield _counter(state, f"{prefix}_queries", "Tokens looked up.", totals.prompt_tokens)
        yield _counter(state, f"{prefix}_hits", "Tokens found on the device.", cached.device)
    beyond = totals.prompt_tokens - cached.device
    yield _counter(state, "external_prefix_cache_queries", "Tokens not on the device.", beyond)
    found = cached.total - cached.device
    yield _counter(state, "external_prefix_cache_hits", "Of them, found elsewhere.", found)
    yield _counter(state, "prompt_tokens", "Tokens of prompts.", totals.prompt_tokens)
    yield _counter(state, "prompt_tokens_cached", "Of them, known.", cached.total)
    sources = asdict(cached)
    yield _by(
        state, "prompt_tokens_cached_by_source", "Known, by tier.", "source", sources, is_total=True
    )
    yield _counter(state, "generation_tokens", "Tokens generated.", totals.generated_tokens)
    yield _counter(state, "num_preemptions", "Requests put back.", totals.preemptions)
    labels = ["model_name", "engine", "block_size"]
    config = GaugeMetricFamily("vllm:cache_config_info", "Tokens of a chunk.", labels=labels)
    config.add_metric([state.model, "0", str(chunk_tokens)], 1.0)
    yield config


def llamacpp_metrics(state: "EngineState") -> Iterator[Metric]:
    """Yield what llama.cpp's server calls ``llamacpp:…``."""
    totals = state.totals
    for name, text, value in (
        ("prompt_tokens", "Prompt tokens computed.", totals.computed_tokens),
        ("prompt_tokens_cached", "Prompt tokens known.", totals.cached.total),
        ("prompt_seconds", "Computing prompts.", totals.prefill_s),
        ("tokens_predicted", "Tokens generated.", totals.generated_tokens),
        ("tokens_predicted_seconds", "Generating them.", totals.decode_s),
    ):
        yield CounterMetricFamily(f"llamacpp:{name}", text, value=value)
    for name, text, value in (
        ("prompt_tokens_seconds", "Prompt tokens per second.",
         _rate(totals.computed_tokens, totals.prefill_s)),
        ("predicted_tokens_seconds", "Generated tokens per second.",
         _rate(totals.generated_tokens, totals.decode_s)),
        ("requests_processing", "Being computed.", state.num_running),
        ("requests_deferred", "Waiting.", state.num_waiting),
    ):  # fmt: skip
        yield GaugeMetricFamily(f"llamacpp:{name}", text, value=value)


def _device(state: "EngineState") -> "TierState | None":
    return next((tier for tier in state.tiers if tier.name == "device"), None)


def _usage(tier: "TierState | None") -> float:
    if tier is None or not tier.capacity_bytes:
        return 0.0
    return tier.used_bytes / tier.capacity_bytes


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds else 0.0


def _gauge(state: "EngineState", name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name", "engine"])
    family.add_metric([state.model, "0"], value)
    return family


def _counter(state: "EngineState", name: str, text: str, value: float) -> Metric:
    family = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name", "engine"])
    family.add_metric([state.model, "0"], value)
    return family


def _by(
    state: "EngineState",
    name: str,
    text: str,
    label: str,
    values: dict[str, int],
    *,
    is_total: bool = False,
) -> Metric:
    kind = CounterMetricFamily if is_total else GaugeMetricFamily
    family: Metric = kind(f"vllm:{name}", text, labels=["model_name", "engine", label])
    for value, count in values.items():
        family.add_metric([state.model, "0", value], count)  # type: ignore[attr-defined]
    return family
