"""What a request cost and what was known already, as each API reports it."""

from dataclasses import asdict
from typing import Any

from offload.daemon.http.generation import Answer


def kv_usage(answer: Answer) -> dict[str, Any]:
    """Return ``usage.kv``, our own: where known tokens came from, and why no more were known."""
    started, cached = answer.started, answer.cached
    miss = started.miss if started else None
    return {
        "by_source": asdict(cached),
        "restored_bytes": started.restored_bytes if started else 0,
        "restore_ms": round(started.restore_s * 1e3, 3) if started else 0.0,
        "miss": None if miss is None else {"at_token": miss.at_token, "reason": miss.reason},
    }


def openai_usage(answers: list[Answer]) -> dict[str, Any]:
    """Return ``usage`` of chats and completions; the prompt of several choices counts once."""
    first, generated = answers[0], sum(len(answer.tokens) for answer in answers)
    prompt = num_prompt_tokens(first)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {
            "cached_tokens": first.cached.total,
            "cache_write_tokens": _written(first),
        },
        "kv": kv_usage(first),
    }


def responses_usage(answer: Answer) -> dict[str, Any]:
    """Return ``usage`` of ``/v1/responses``."""
    prompt, generated = num_prompt_tokens(answer), len(answer.tokens)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": answer.cached.total,
            "cache_write_tokens": _written(answer),
        },
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + generated,
        "kv": kv_usage(answer),
    }


def anthropic_usage(answer: Answer) -> dict[str, Any]:
    """Return ``usage`` of ``/v1/messages``, whose ``input_tokens`` are those without the cache."""
    written, cached = _written(answer), answer.cached.total
    return {
        "input_tokens": max(0, num_prompt_tokens(answer) - cached - written),
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": written,
        "output_tokens": len(answer.tokens),
        "kv": kv_usage(answer),
    }


def llamacpp_timings(answer: Answer) -> dict[str, Any]:
    """Return ``timings`` of llama.cpp: ``cache_n + prompt_n + predicted_n`` is the context."""
    finished, cached = answer.finished, answer.cached.total
    computed, generated = num_prompt_tokens(answer) - cached, len(answer.tokens)
    prompt_ms = finished.prefill_s * 1e3 if finished else 0.0
    predicted_ms = finished.decode_s * 1e3 if finished else 0.0
    return {
        "cache_n": cached,
        "prompt_n": computed,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(1, computed),
        "prompt_per_second": computed / max(1e-9, prompt_ms / 1e3),
        "predicted_n": generated,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / max(1, generated),
        "predicted_per_second": generated / max(1e-9, predicted_ms / 1e3),
    }


def kv_headers(answer: Answer, hint: str | None) -> dict[str, str]:
    """Return the headers that clients and load balancers may go by."""
    session = answer.session or hint
    known = {"X-KV-Cached-Tokens": str(answer.cached.total)} if answer.started else {}
    return known | ({"X-Session-ID": header_text(session)} if session else {})


def header_text(text: str) -> str:
    """Return a text as it can stand in a header: printable ASCII."""
    return text.encode("ascii", "replace").decode()


def num_prompt_tokens(answer: Answer) -> int:
    """Return the length of the prompt."""
    return answer.started.num_prompt_tokens if answer.started else 0


def _written(answer: Answer) -> int:
    return answer.finished.num_written_tokens if answer.finished else 0
