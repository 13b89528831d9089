"""Log-probabilities of tokens in OpenAI's replies."""

from collections.abc import Sequence
from typing import Any

from offload.daemon.http.render import Renderer
from offload.daemon.requests import Token, TokenLogprob

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def chat_logprobs(renderer: Renderer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return ``logprobs`` of a choice of a chat."""
    return {"content": [token_entry(renderer, token) for token in tokens], "refusal": None}


def token_entry(renderer: Renderer, token: Token) -> dict[str, Any]:
    """Return what is reported of one token."""
    entry = _entry(renderer, token.token_id, token.logprob)
    tops = [_entry(renderer, top.token_id, top.logprob) for top in token.tops]
    return entry | {"top_logprobs": tops}


def _entry(renderer: Renderer, token_id: int, logprob: float | None) -> dict[str, Any]:
    text = renderer.token_text(token_id)
    return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}


def finite(logprob: float | None) -> float:
    """Return a log-probability that JSON can say."""
    return LEAST_LOGPROB if logprob is None else max(LEAST_LOGPROB, logprob)


def completion_logprobs(
    renderer: Renderer, entries: Sequence[tuple[int, float | None, Sequence[TokenLogprob]]]
) -> dict[str, Any]:
    """Return ``logprobs`` of a completion; the first token of a prompt has none.

    Parameters
    ----------
    renderer : Renderer
    entries : sequence of (token id, log-probability, likeliest tokens)
    """
    texts = [renderer.token_text(token_id) for token_id, _, _ in entries]
    offsets, at = [], 0
    for text in texts:
        offsets.append(at)
        at += len(text)
    tops = [
        None
        if logprob is None
        else {renderer.token_text(top.token_id): finite(top.logprob) for top in likeliest}
        | {text: finite(logprob)}
        for text, (_, logprob, likeliest) in zip(texts, entries, strict=True)
    ]
    logprobs = [None if logprob is None else finite(logprob) for _, logprob, _ in entries]
    return {
        "tokens": texts,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }
