"""``POST /completion``, llama.cpp's own."""

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from offload.daemon.errors import BadRequest
from offload.daemon.http.body import StrictJsonRoute
from offload.daemon.http.context import Caller, Context, HttpContext, new_id, request_id_of
from offload.daemon.http.generation import Answer, answer_of, while_connected
from offload.daemon.http.logprobs import token_entry
from offload.daemon.http.prompts import check_ids
from offload.daemon.http.routes_slots import slot_session
from offload.daemon.http.schema_common import error_responses, with_stream
from offload.daemon.http.schema_llamacpp import NativeReply, NativeRequest
from offload.daemon.http.sse import COMMENT, data_event
from offload.daemon.http.stream import OpenStream, event_stream, open_stream, progress
from offload.daemon.http.usage import kv_headers, llamacpp_timings, num_prompt_tokens
from offload.daemon.requests import Finished, GenerationRequest, PrefillProgress, Token

router = APIRouter(route_class=StrictJsonRoute, tags=["llama.cpp"], responses=error_responses())


@dataclass(frozen=True, slots=True)
class _Native:
    """One request with the name it is answered under."""

    context: HttpContext
    body: NativeRequest
    model: str


@router.post(
    "/completion",
    response_model=NativeReply,
    responses=with_stream("The continuation; with `stream`, chunks as server-sent events."),
)
async def create_native_completion(
    body: NativeRequest, request: Request, context: Context, tenant: Caller
) -> Response:
    """Continue a text."""
    native = _Native(context, body, context.model_name(body.model))
    token_ids = await context.work(_token_ids, context, body.prompt)
    hint = context.session_hint(body, request.headers)
    if hint is None and body.id_slot >= 0:
        hint = slot_session(body.id_slot)
    maximum = body.n_predict if body.n_predict >= 0 else context.options.default_max_tokens
    if body.repetition_penalty is None:
        body.repetition_penalty = body.repeat_penalty
    sampling = body.sampling(
        maximum,
        top_logprobs=body.n_probs or None,
        grammar=None if body.json_schema is None else json.dumps(body.json_schema),
    )
    generation = GenerationRequest(
        request_id=request_id_of(request),
        tenant=tenant.name,
        token_ids=token_ids,
        sampling=sampling,
        session=hint if body.cache_prompt else None,
        # Under a salt of its own, a prompt finds nothing that is known.
        cache_salt=body.cache_salt if body.cache_prompt else new_id("once-"),
        is_kept=body.cache_prompt,
    )
    if body.stream:
        stream = await open_stream(context, request, tenant, generation)
        source = _chunks(native, stream)
        return event_stream(
            context, stream, source, lambda problem: data_event(problem.openai()), hint
        )
    with context.admitted(tenant):
        answer = await while_connected(request, answer_of(context.engine, generation))
    reply = _last(native, answer, answer.text, answer.token_ids)
    if body.n_probs:
        renderer = context.renderer
        reply["completion_probabilities"] = [token_entry(renderer, t) for t in answer.tokens]
    return JSONResponse(reply, headers=kv_headers(answer, hint))


def _token_ids(context: HttpContext, prompt: str | list[int | str]) -> tuple[int, ...]:
    """Return the tokens of a text, or of tokens and texts in turn."""
    renderer, parts = context.renderer, [prompt] if isinstance(prompt, str) else prompt
    ids: list[int] = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            ids += renderer.encode(part, add_special_tokens=number == 0)
        else:
            ids += check_ids([part], len(renderer.tokenizer))
    if not ids:
        raise BadRequest("the prompt has no tokens", "prompt")
    return tuple(ids)


def _last(native: _Native, answer: Answer, content: str, token_ids: list[int]) -> dict[str, Any]:
    finished, num_prompt = answer.finished, num_prompt_tokens(answer)
    stop_text = (finished.stop_text if finished else None) or ""
    is_limit = finished is not None and finished.reason == "length"
    stop_type = "limit" if is_limit else "word" if stop_text else "eos"
    return {
        "index": 0,
        "content": content,
        "tokens": token_ids if native.body.return_tokens else [],
        "id_slot": native.body.id_slot,
        "stop": True,
        "model": native.model,
        "tokens_predicted": len(answer.tokens),
        "tokens_evaluated": num_prompt,
        "tokens_cached": num_prompt + len(answer.tokens),
        "truncated": False,
        "stop_type": stop_type,
        "stopping_word": stop_text,
        "timings": llamacpp_timings(answer),
    }


async def _chunks(native: _Native, stream: OpenStream) -> AsyncGenerator[bytes, None]:
    answer = stream.answer
    async for event in stream.feed:
        if event is None:
            yield COMMENT
            continue
        answer.add(event)
        match event:
            case PrefillProgress() if native.body.return_progress:
                told = {"prompt_progress": progress(event, answer)}
                yield data_event({"index": 0, "content": "", "tokens": [], "stop": False} | told)
            case Token():
                chunk = {"index": 0, "content": event.text, "tokens": [event.token_id]}
                yield data_event(chunk | {"stop": False, "id_slot": native.body.id_slot})
            case Finished():
                yield data_event(_last(native, answer, event.text, []))
