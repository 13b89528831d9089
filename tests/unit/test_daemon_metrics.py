"""Metrics: names that dashboards know, and numbers that are the engine's."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from offload.daemon.ops.metrics import EngineCollector
from offload.daemon.ops.metrics_histograms import RequestMetrics
from offload.daemon.ops.status_wear import DiskWear
from offload.daemon.ops.watched_engine import RequestRecord
from offload.daemon.requests import CachedTokens, Finished, GenerationRequest, Sampling
from offload.daemon.sharing.sharing_state import SharingState
from offload.daemon.state import EngineState, TierState, Totals

TOTALS = Totals(
    requests=9,
    prompt_tokens=100,
    computed_tokens=40,
    generated_tokens=7,
    cached=CachedTokens(10, 20, 30),
    prefill_s=2.0,
    decode_s=0.5,
    prefill_s_saved=3.0,
    restores=4,
    persists=5,
    persisted_bytes=6,
    evictions={"disk": 2},
    misses={"cold": 8},
    preemptions=1,
)
STATE = EngineState(
    model='re"call',
    fingerprint="f",
    started_s=1.0,
    is_ready=True,
    is_draining=False,
    is_persisting=False,
    num_running=2,
    num_prefilling=1,
    num_waiting=3,
    tiers=(TierState("device", 100, 25, 50, 7, 8, 1.5, 2.5), TierState("disk", 10, 1, 2, 3, 4)),
    totals=TOTALS,
    sessions={"running": 1, "disk": 6},
    saved_bytes=99,
)
MODEL = {"model_name": 're"call', "engine": "0"}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(registry: CollectorRegistry) -> Samples:
    text = generate_latest(registry).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def collected(
    state: EngineState = STATE, compat: tuple[str, ...] = ("vllm", "llamacpp"), good: bool = True
) -> Samples:
    registry = CollectorRegistry()
    registry.register(EngineCollector(lambda: state, 64, compat, lambda: 77, lambda: good))
    return samples_of(registry)


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("vllm:num_requests_running", {}, 2),
        ("vllm:num_requests_waiting", {}, 3),
        ("vllm:num_requests_waiting_by_reason", {"reason": "capacity"}, 3),
        ("vllm:kv_cache_usage_perc", {}, 0.25),
        ("vllm:gpu_cache_usage_perc", {}, 0.25),
        ("vllm:prefix_cache_queries_total", {}, 100),
        ("vllm:prefix_cache_hits_total", {}, 10),
        ("vllm:gpu_prefix_cache_hits_total", {}, 10),
        ("vllm:external_prefix_cache_queries_total", {}, 90),
        ("vllm:external_prefix_cache_hits_total", {}, 50),
        ("vllm:prompt_tokens_total", {}, 100),
        ("vllm:prompt_tokens_cached_total", {}, 60),
        ("vllm:prompt_tokens_cached_by_source_total", {"source": "device"}, 10),
        ("vllm:prompt_tokens_cached_by_source_total", {"source": "host"}, 20),
        ("vllm:prompt_tokens_cached_by_source_total", {"source": "disk"}, 30),
        ("vllm:generation_tokens_total", {}, 7),
        ("vllm:num_preemptions_total", {}, 1),
        ("vllm:cache_config_info", {"block_size": "64"}, 1),
    ],
)
def test_metric_of_vllm_has_its_name_its_labels_and_our_number(
    name: str, labels: dict[str, str], value: float
) -> None:
    assert collected()[name, frozenset((MODEL | labels).items())] == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("llamacpp:prompt_tokens_total", 40),
        ("llamacpp:prompt_tokens_cached_total", 60),
        ("llamacpp:prompt_seconds_total", 2),
        ("llamacpp:tokens_predicted_total", 7),
        ("llamacpp:tokens_predicted_seconds_total", 0.5),
        ("llamacpp:prompt_tokens_seconds", 20),
        ("llamacpp:predicted_tokens_seconds", 14),
        ("llamacpp:requests_processing", 2),
        ("llamacpp:requests_deferred", 3),
    ],
)
def test_metric_of_llamacpp_has_its_name_and_our_number(name: str, value: float) -> None:
    assert collected()[name, frozenset()] == value


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("offload_tier_capacity_bytes", {"tier": "disk"}, 10),
        ("offload_tier_peak_bytes", {"tier": "device"}, 50),
        ("offload_tier_read_bytes_total", {"tier": "device"}, 7),
        ("offload_tier_write_bytes_total", {"tier": "disk"}, 4),
        ("offload_tier_bandwidth_bytes_per_second", {"tier": "device", "op": "write"}, 2.5),
        ("offload_sessions", {"state": "disk"}, 6),
        ("offload_sessions", {"state": "host"}, 0),
        ("offload_evictions_total", {"tier": "disk"}, 2),
        ("offload_miss_total", {"reason": "cold"}, 8),
        ("offload_miss_total", {"reason": "corrupt"}, 0),
        ("offload_prefill_tokens_saved_total", {}, 60),
        ("offload_prefill_seconds_saved_total", {}, 3),
        ("offload_disk_written_bytes_today", {}, 77),
        ("offload_persistence_ok", {}, 0),
        ("offload_saved_bytes", {}, 99),
        ("offload_config_last_reload_successful", {}, 1),
    ],
)
def test_metric_of_our_own_has_our_number(name: str, labels: dict[str, str], value: float) -> None:
    assert collected()[name, frozenset(labels.items())] == value


def test_sharing_shows_where_there_is_any() -> None:
    sharing = SharingState(is_reachable=False, num_held=3, publications=4, lost_leases=1)
    found = collected(replace(STATE, sharing=sharing))
    names = ("reachable", "held_sessions", "publications_total", "lost_leases_total")
    assert [found[f"offload_sharing_{name}", frozenset()] for name in names] == [0, 3, 4, 1]
    assert not [name for name, _ in collected() if name.startswith("offload_sharing")]


def test_names_of_others_are_left_out_where_they_are_not_wanted() -> None:
    assert {name.split("_")[0] for name, _ in collected(compat=())} == {"offload"}


def test_reload_that_was_refused_shows() -> None:
    assert collected(good=False)["offload_config_last_reload_successful", frozenset()] == 0


def test_engine_that_has_done_nothing_divides_by_nothing() -> None:
    idle = replace(STATE, tiers=(), totals=Totals())
    assert collected(idle)["llamacpp:prompt_tokens_seconds", frozenset()] == 0


def ended(outcome: str, finished: Finished | None, first_s: float | None = 0.03) -> RequestRecord:
    request = GenerationRequest("r", "ann", (1,), Sampling())
    return RequestRecord(
        request,
        0.0,
        "ended",
        first_token_s=first_s,
        ended_s=0.9,
        finished=finished,
        outcome=outcome,
    )


def test_requests_that_ended_are_in_the_histograms() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry, 're"call')
    done = Finished("stop", "", None, 12, 3, CachedTokens(), 0, 0.5, 0.2, 0.1)
    metrics.observe_end(ended("stop", done))
    metrics.observe_end(ended("cancelled", None, None))
    metrics.observe_end(ended("QueueFull", None, None))
    metrics.observe_gap(0.02)
    samples = samples_of(registry)

    def value(name: str, **labels: str) -> float:
        return samples[f"vllm:{name}", frozenset((MODEL | labels).items())]

    assert value("request_success_total", finished_reason="stop") == 1
    assert value("request_success_total", finished_reason="abort") == 1
    assert value("request_success_total", finished_reason="error") == 1
    assert value("time_to_first_token_seconds_bucket", le="0.02") == 0
    assert value("time_to_first_token_seconds_bucket", le="0.04") == 1
    assert value("time_to_first_token_seconds_bucket", le="2560.0") == 1
    assert value("e2e_request_latency_seconds_sum") == 0.9
    assert value("request_time_per_output_token_seconds_sum") == pytest.approx(0.1)
    assert value("inter_token_latency_seconds_count") == 1
    assert value("request_inference_time_seconds_sum") == pytest.approx(0.7)
    assert value("request_prompt_tokens_sum") == 12


def test_two_daemons_of_one_process_share_no_metric() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    RequestMetrics(first, "a").observe_gap(1.0)
    RequestMetrics(second, "a")
    name = "vllm:inter_token_latency_seconds_count"
    labels = frozenset({"model_name": "a", "engine": "0"}.items())
    assert (samples_of(first)[name, labels], samples_of(second)[name, labels]) == (1, 0)


def test_wear_of_a_day_goes_on_over_a_restart_and_ends_at_midnight(tmp_path: Path) -> None:
    now = [86_400.0 * 100]
    first = DiskWear(tmp_path / "wear.json", lambda: now[0])
    assert [first.update(total) for total in (10, 10, 25)] == [10, 10, 25]
    first.save()
    second = DiskWear(tmp_path / "wear.json", lambda: now[0])
    assert second.update(5) == 30
    now[0] += 86_400
    assert [second.update(total) for total in (5, 7)] == [0, 2]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"day": "x", "bytes": 1}'])
def test_wear_of_a_damaged_file_starts_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "wear.json").write_text(content)
    assert DiskWear(tmp_path / "wear.json", time.time).update(3) == 3
