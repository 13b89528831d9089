"""The body of a response, from the moment it is made to its end."""

import time
from collections.abc import Sequence
from typing import Any

from offload.daemon.http.errors import Problem
from offload.daemon.http.generation import Answer
from offload.daemon.http.schema_responses import Item, ResponsesRequest
from offload.daemon.http.usage import responses_usage


def response_head(body: ResponsesRequest, response_id: str, model: str) -> dict[str, Any]:
    """Return a response that nothing has come of yet."""
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    name = body.conversation_id
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": bool(body.background),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id if name is None else None,
        "conversation": None if name is None else {"id": name},
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": body.reasoning,
        "store": body.is_stored,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }


def finished_response(
    head: dict[str, Any], answer: Answer, output: Sequence[Item]
) -> dict[str, Any]:
    """Return a response with its answer."""
    has_call = any(item["type"] == "function_call" for item in output)
    is_incomplete = status_of(answer) == "incomplete" and not has_call
    return head | {
        "status": "incomplete" if is_incomplete else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if is_incomplete else None,
        "completed_at": int(time.time()),
        "output": list(output),
        "usage": responses_usage(answer),
    }


def status_of(answer: Answer) -> str:
    """Return whether an answer was cut short, as its message says it."""
    is_cut = answer.finished is not None and answer.finished.reason == "length"
    return "incomplete" if is_cut else "completed"


def failed_response(head: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """Return a response that came to nothing."""
    known = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
    code = known.get(problem.status, "server_error")
    return head | {"status": "failed", "error": {"code": code, "message": problem.message}}
