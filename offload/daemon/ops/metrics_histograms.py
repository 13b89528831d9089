"""Histograms and counters that are fed request by request, under vLLM's names."""

from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Histogram

if TYPE_CHECKING:
    from offload.daemon.ops.watched_engine import RequestRecord

_TTFT_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_BUCKETS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
_TIME_BUCKETS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_COUNT_BUCKETS: Final = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))

_TIMES: Final = {
    "queue": "waiting",
    "prefill": "reading the prompt",
    "decode": "writing the answer",
    "inference": "both of them",
}


class RequestMetrics:
    """What is known of requests one by one. Fed on one event loop.

    Parameters
    ----------
    registry : CollectorRegistry
        Of one daemon; nothing is global.
    model : str
        Its name, a label.
    """

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._registry = registry
        self._labels = {"model_name": model, "engine": "0"}
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            [*self._labels, "finished_reason"],
            registry=registry,
        )
        make = self._histogram
        self._ttft = make("time_to_first_token_seconds", "To the first token.", _TTFT_BUCKETS)
        self._gap = make("inter_token_latency_seconds", "Between two tokens.", _TOKEN_BUCKETS)
        self._per_token = make(
            "request_time_per_output_token_seconds", "Mean of a request.", _TOKEN_BUCKETS
        )
        self._e2e = make("e2e_request_latency_seconds", "Of whole requests.", _TIME_BUCKETS)
        self._times = {
            name: make(f"request_{name}_time_seconds", f"Of requests: {text}.", _TIME_BUCKETS)
            for name, text in _TIMES.items()
        }
        self._prompt = make("request_prompt_tokens", "Tokens of prompts.", _COUNT_BUCKETS)
        self._generated = make("request_generation_tokens", "Tokens of answers.", _COUNT_BUCKETS)

    def observe_gap(self, seconds: float) -> None:
        """Count the time between two tokens."""
        self._gap.observe(seconds)

    def observe_end(self, record: "RequestRecord") -> None:
        """Count a request that has ended."""
        self._success.labels(**self._labels, finished_reason=_reason(record.outcome)).inc()
        if record.ttft_s is not None:
            self._ttft.observe(record.ttft_s)
        finished = record.finished
        if finished is None or record.ended_s is None:
            return
        self._e2e.observe(record.ended_s - record.asked_s)
        self._prompt.observe(finished.num_prompt_tokens)
        self._generated.observe(finished.num_generated_tokens)
        self._times["queue"].observe(finished.queue_s)
        self._times["prefill"].observe(finished.prefill_s)
        self._times["decode"].observe(finished.decode_s)
        self._times["inference"].observe(finished.prefill_s + finished.decode_s)
        if finished.num_generated_tokens > 1:
            self._per_token.observe(finished.decode_s / (finished.num_generated_tokens - 1))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(
            f"vllm:{name}", text, [*self._labels], registry=self._registry, buckets=buckets
        )
        child: Histogram = family.labels(**self._labels)
        return child


def _reason(outcome: str) -> str:
    """Return vLLM's word for how a request has ended."""
    if outcome in ("stop", "length"):
        return outcome
    return "abort" if outcome == "cancelled" else "error"
